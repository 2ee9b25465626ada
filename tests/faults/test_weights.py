"""Hundreds of damaged files of weights, through every loader: each loads or is refused in one sentence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from mmpretrain.models import VisionTransformer

from helpers import rest_slow
from mmmilan.checkpoints.io import check_values, get_state_dict, load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.layouts import convert
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mutations import spoil_bytes, spoil_pickle, spoil_values, write
from weight_files import ARCH, as_encoder, honest, survives


def as_init_cfg(path: Path) -> None:
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    VisionTransformer(ARCH, img_size=32, patch_size=16, out_type='avg_featmap', init_cfg=init_cfg).init_weights()


def as_converter(path: Path) -> None:
    weights = get_state_dict(load_checkpoint_file(path), str(path))
    try:
        check_values(convert(weights, 'timm', encoder_only=True), 'its weights')
    except InputError as error:
        raise InputError(f'{path}: {error}') from error


LOADERS = [as_encoder, as_init_cfg, as_converter]


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_flipped_bits_are_found(tmp_path, ending):
    """Every flipped bit that changes a weight. The format of PyTorch before 1.6, without checksums, is not tested."""
    path, rng = tmp_path / f'weights.{ending}', random.Random(0)
    checkpoint = honest()
    if ending == 'safetensors':
        save_checkpoint_file(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    content = bytearray(path.read_bytes())
    refused = 0
    for _ in range(100):
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        content[place] ^= bit
        write(path, bytes(content))
        content[place] ^= bit
        try:
            loaded = get_state_dict(load_checkpoint_file(path))
            same = all(torch.equal(loaded[key], value) for key, value in checkpoint['state_dict'].items())
            assert same  # the flip was in the padding
        except InputError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize('ending', ['pth', 'legacy', 'safetensors'])
@pytest.mark.parametrize('load', rest_slow(LOADERS, as_encoder))
def test_spoilt_bytes(tmp_path, safe_mmengine, load, ending):
    path, rng = tmp_path / f'weights.{ending}', random.Random(1)
    if ending == 'safetensors':
        save_checkpoint_file(honest(), path)
    else:
        torch.save(honest(), path, _use_new_zipfile_serialization=ending == 'pth')
    content = path.read_bytes()
    messages = [survives(load, write(path, spoil_bytes(content, rng))) for _ in range(40)]
    assert sum(message is not None for message in messages) > (12 if ending == 'legacy' else 30)


@pytest.mark.slow
def test_spoilt_pickles_with_sound_checksums(tmp_path):
    path, rng = tmp_path / 'weights.pth', random.Random(2)
    torch.save(honest(), path)
    content = path.read_bytes()
    messages = [survives(as_encoder, write(path, spoil_pickle(content, rng))) for _ in range(120)]
    assert sum(message is not None for message in messages) > 60


@pytest.mark.parametrize('load', rest_slow(LOADERS, as_encoder))
def test_spoilt_values(tmp_path, safe_mmengine, load):
    path, rng, checkpoint = tmp_path / 'weights.pth', random.Random(3), honest()
    only_weights = {'state_dict': checkpoint['state_dict'], 'meta': checkpoint['meta']}
    messages = [survives(load, write(path, spoil_values(only_weights, rng))) for _ in range(100)]
    assert sum(message is not None for message in messages) > 40


@pytest.mark.parametrize('with_model', rest_slow([False, True], False))
def test_teachers(tmp_path, clip_file, with_model):
    """A teacher's file in OpenAI's layout; or read as timm's, when the config names a model."""
    config = dict(type='mmmilan.OpenCLIPTeacher')
    weights = torch.load(clip_file)
    if with_model:
        config = dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224.augreg_in21k')
    path, rng = tmp_path / 'teacher.pt', random.Random(4)

    def load(path):
        MODELS.build(config | dict(pretrained=str(path)))

    torch.save(weights, path)
    content, refused = path.read_bytes(), 0
    for turn in range(12 if with_model else 60):
        spoilt = spoil_values(weights, rng) if turn % 2 else spoil_bytes(content, rng)
        refused += survives(load, write(path, spoilt)) is not None
    assert refused > (10 if with_model else 40)
