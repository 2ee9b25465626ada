"""Small models and data that several tests share."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / 'shared'


@pytest.fixture(autouse=True)
def reproducible():
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope='session')
def official():
    """What the published code computed, see tests/data/README.md."""
    with np.load(ROOT / 'tests/data/official_tiny.npz') as file:
        recorded = {key: torch.from_numpy(file[key]) for key in file.files if key != 'config'}
        recorded['config'] = json.loads(str(file['config']))
    return recorded


@pytest.fixture
def clip_file(official, tmp_path):
    """A visual tower alone, in OpenAI's layout: width 128, 2 layers, 4 x 4 patches of 16, 24 dimensions."""
    path = tmp_path / 'clip.pt'
    torch.save({key[5:]: value for key, value in official.items() if key.startswith('clip/')}, path)
    return str(path)


@pytest.fixture
def milan_cfg(clip_file):
    """MILAN in the sizes of the recorded run, with its teacher."""
    arch = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192)
    return dict(
        type='mmmilan.MILAN',
        backbone=dict(type='mmmilan.MILANViT', arch=arch, img_size=64, patch_size=16),
        masking=dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75),
        neck=dict(
            type='mmmilan.PromptingDecoder',
            num_patches=16,
            embed_dim=48,
            decoder_embed_dim=32,
            decoder_depth=2,
            decoder_num_heads=4,
            predict_feature_dim=24,
        ),
        head=dict(type='mmmilan.CLIPTarget', teacher=dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)),
    )


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """24 small images in three nested folders."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for i in range(24):
        path = root / f'class{i % 3}' / 'nested' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        image = cv2.resize(rng.integers(0, 255, (8, 10, 3), dtype=np.uint8), (80, 72), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(path), image)
    return root
