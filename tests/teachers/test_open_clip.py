"""CLIP's own tower as a teacher, against open_clip."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

from helpers import assert_clip, relative_error, rest_slow
from mmmilan.errors import InputError


def test_open_clip(clip, build):
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path)
    assert (teacher.feature_dim, teacher.patch_size, teacher.num_patches) == (24, 14, 16)
    images = torch.randn(3, 3, 56, 56)
    assert_clip(teacher, images, open_clip.create_model(f'{name}-56', pretrained=path).eval().visual, images)


@torch.no_grad()
def test_tokens_of_several_layers(clip, build):
    """Against open_clip's own intermediate tokens; the last ones give the features."""
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path)
    visual = open_clip.create_model(f'{name}-56', pretrained=path).eval().visual
    images = torch.randn(3, 3, 56, 56)
    own = visual.forward_intermediates(images, output_fmt='NLC', output_extra_tokens=True)
    own = [
        torch.cat(pair, 1) for pair in zip(own['image_intermediates_prefix'], own['image_intermediates'], strict=True)
    ]
    features, importance = teacher(images)
    tokens, same_importance = teacher.forward_layers(images, [1, -2, 0, -1])
    for actual, expected in zip(tokens, [own[1], own[-2], own[0], own[-1]], strict=True):
        assert actual.shape == (3, 17, teacher.width)
        assert relative_error(actual, expected) < 1e-5
    assert torch.equal(teacher.tower.project(tokens[-1]), features) and torch.equal(same_importance, importance)
    with pytest.raises(InputError, match=r'blocks 0 to 2, not all of \[0, 3\]'):
        teacher.forward_layers(images, [0, 3])


def test_open_clip_on_the_grid_of_the_student(clip, build):
    """Patches of 14 at 196 pixels for a student with patches of 16 at 224; open_clip resizes the positions alike."""
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path, input_size=196)
    assert teacher.num_patches == 14 * 14
    images = torch.randn(2, 3, 224, 224)
    resized = nn.functional.interpolate(images, size=(196, 196), mode='bicubic', antialias=True)
    visual = open_clip.create_model(f'{name}-196', pretrained=path).eval().visual  # resizes the positions
    assert_clip(teacher, images, visual, resized)


def test_refused_options_of_open_clip(clip, build):
    name, path = clip
    with pytest.raises(InputError, match='input_size=200 is not a multiple of its patch size 14; choose 196 or 210'):
        build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path, input_size=200)
    with pytest.raises(InputError, match="no model 'ViT-X-99'"):
        build(type='mmmilan.OpenCLIPTeacher', model='ViT-X-99')
    with pytest.raises(InputError, match="'opanai' is neither a file nor an open_clip tag of ViT-B-16"):
        build(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16', pretrained='opanai')
    with pytest.raises(InputError, match='has neither a model nor weights'):
        build(type='mmmilan.OpenCLIPTeacher')


@pytest.mark.parametrize('model', rest_slow(['RN50', 'convnext_base', 'MobileCLIP-S1'], 'RN50', 'convnext_base'))
def test_refused_towers_of_open_clip(model, build):
    """A ResNet, a ConvNeXt, a hybrid of stages."""
    with pytest.raises(InputError, match=f'image tower of {model} is (a ModifiedResNet|convolutional or hierarchical)'):
        build(type='mmmilan.OpenCLIPTeacher', model=model)


def test_text_tower_is_not_built(build, shallow, monkeypatch):
    """So nothing is downloaded for it: this model's text tower is one of transformers."""
    monkeypatch.setattr(open_clip.model, '_build_text_tower', None)
    teacher = build(type='mmmilan.OpenCLIPTeacher', model='xlm-roberta-base-ViT-B-32', input_size=64)
    assert teacher(torch.randn(1, 3, 64, 64))[0].shape == (1, 5, 512)


@torch.no_grad()
def test_weights_of_another_grid(clip, build):
    """A file of 4 x 4 positions in a model of 14 x 14, interpolated as open_clip does it."""
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-196', pretrained=path)
    visual = open_clip.create_model(f'{name}-196', pretrained=path).eval().visual
    images = torch.randn(2, 3, 196, 196)
    assert_clip(teacher, images, visual, images)


@torch.no_grad()
def test_rectangular_images(clip, build):
    """The positions of the square grid are stretched over the wide one."""
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path, input_size=(56, 112))
    assert teacher.grid == (4, 8) and teacher.num_patches == 32
    visual = open_clip.create_model(f'{name}-56', pretrained=path, force_image_size=(56, 112)).eval().visual
    images = torch.randn(2, 3, 56, 112)
    assert_clip(teacher, images, visual, images)


def test_refused_files(clip, build, tmp_path):
    name, path = clip
    weights = torch.load(path)
    torch.save({key: value for key, value in weights.items() if 'visual' not in key}, tmp_path / 'text.pt')
    with pytest.raises(InputError, match="text.pt does not fit this teacher: it has no 'class_embedding'"):
        build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=str(tmp_path / 'text.pt'))
    del weights['visual.ln_post.bias']
    torch.save(weights, tmp_path / 'part.pt')
    with pytest.raises(InputError, match='part.pt does not fit this teacher ..*ln_post.bias'):
        build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=str(tmp_path / 'part.pt'))
    with pytest.raises(InputError, match='here.pt does not exist'):
        build(type='mmmilan.OpenCLIPTeacher', pretrained='/nowhere/here.pt')


@torch.no_grad()
def test_importance_over_the_last_blocks(clip, build):
    """The mean of the unfused attention of two blocks."""
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path, importance_layers=2)
    visual = open_clip.create_model(f'{name}-56', pretrained=path).eval().visual
    images = torch.randn(2, 3, 56, 56)
    inputs = []
    blocks = visual.transformer.resblocks[-2:]
    for block in blocks:
        block.ln_1.register_forward_hook(lambda module, args, output: inputs.append(output))
    visual(images)
    rows = [block.attn(x, x, x, need_weights=True)[1][:, 0, 1:] for block, x in zip(blocks, list(inputs), strict=True)]
    assert relative_error(teacher(images)[1], (rows[0] + rows[1]) / 2) < 1e-5
    assert 'mean of the last 2 blocks' in teacher.describe()


def test_importance_sums_to_less_than_one(clip_file, official, build):
    teacher = build(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    importance = teacher(official['input'])[1]
    assert importance.min() > 0 and (importance.sum(1) < 1).all()


def test_teacher_in_reduced_precision(clip_file, official, build):
    """Under autocast, features are bfloat16 and close to float32; the importance stays a float32 softmax."""
    teacher = build(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    expected, expected_importance = teacher(official['input'])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        features, importance = teacher(official['input'])
    assert features.dtype == torch.bfloat16 and importance.dtype == torch.float32
    assert relative_error(features, expected) < 0.03
    assert relative_error(importance, expected_importance) < 0.03
