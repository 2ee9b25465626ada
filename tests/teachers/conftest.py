"""Small models of both libraries with random weights."""

from __future__ import annotations

import json

import open_clip
import pytest
import timm
import torch
from torch import nn

from helpers import randomise
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher

VISION = dict(image_size=56, patch_size=14, width=64, layers=3, head_width=16)


@pytest.fixture
def build():
    """Builds a teacher from its config, to be fed images as it takes them."""

    def build(**cfg) -> Teacher:
        return MODELS.build(dict(teacher_mean_std=None) | cfg).eval()

    return build


@pytest.fixture(params=[True, False], ids=['QuickGELU', 'GELU'])
def clip(request, tmp_path):
    """Name of a small open_clip model whose ViT has the patches of ViT-L/14, and its weights, all random."""
    name = f'milan-test-{request.param}'
    text = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    for size in (56, 196):
        cfg = dict(embed_dim=24, quick_gelu=request.param, vision_cfg=VISION | dict(image_size=size), text_cfg=text)
        (tmp_path / f'{name}-{size}.json').write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path)
    weights = randomise(open_clip.create_model(f'{name}-56')).state_dict()
    torch.save(weights, tmp_path / 'clip.pt')
    return name, str(tmp_path / 'clip.pt')


@pytest.fixture
def vit(tmp_path):
    """timm's ViT-Ti/16 at 64 pixels with random weights, in a file."""
    vit = randomise(timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=64))
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    return vit, str(tmp_path / 'vit.pth')


@pytest.fixture
def shallow(monkeypatch):
    """Both libraries build their models with two blocks, and open_clip its own ViTs also with two heads."""
    create_model, get_model_config = timm.create_model, open_clip.get_model_config

    def shallow_config(name: str) -> dict:
        config = get_model_config(name)
        if isinstance(config['vision_cfg'].get('layers'), int):  # a ViT of open_clip's own
            config['vision_cfg'] |= dict(layers=2, width=2 * config['vision_cfg'].get('head_width', 64))
        return config

    def shallow_model(name: str, **kwargs) -> nn.Module:
        if 'sapiens2' in name:  # one number for each block
            kwargs['num_kv_heads'] = (None, None)
        try:
            return create_model(name, **dict(depth=2) | kwargs)
        except (TypeError, ValueError):  # not a plain stack of blocks
            return create_model(name, **kwargs)

    monkeypatch.setattr(timm, 'create_model', shallow_model)
    monkeypatch.setattr(open_clip, 'get_model_config', shallow_config)
