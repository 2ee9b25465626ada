"""MaskAlign's loss against the published implementation's recorded results (tests/data/maskalign_tiny.npz)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmpretrain.structures import DataSample
from torch import Tensor

from helpers import ROOT, gradients, openai_numbers, relative_error, strip_prefix
from mmmilan.checkpoints.layouts import convert
from mmmilan.errors import InputError
from mmmilan.models import MILAN
from mmmilan.registry import MODELS

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Names in a CLIP's image tower: Hugging Face's and OpenAI's.
NAMES = {
    'embeddings.class_embedding': 'class_embedding',
    'embeddings.patch_embedding.': 'conv1.',
    'embeddings.position_embedding.weight': 'positional_embedding',
    'pre_layrnorm.': 'ln_pre.',
    'post_layernorm.': 'ln_post.',
    'encoder.layers.': 'transformer.resblocks.',
    '.self_attn.out_proj.': '.attn.out_proj.',
    '.layer_norm1.': '.ln_1.',
    '.layer_norm2.': '.ln_2.',
    '.mlp.fc1.': '.mlp.c_fc.',
    '.mlp.fc2.': '.mlp.c_proj.',
}


@pytest.fixture(scope='module')
def recorded() -> dict:
    with np.load(ROOT / 'tests/data/maskalign_tiny.npz') as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != 'config'} | {
            'config': json.loads(str(file['config']))
        }


def clip_weights(recorded: dict) -> dict[str, Tensor]:
    """The teacher in OpenAI's layout. CLIP's own normalisation of images is folded into its first layer."""
    prefix, weights = 'weight/clip_model.vision_model.', {}
    for key, value in recorded.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for theirs, openai in NAMES.items():
                name = name.replace(theirs, openai)
            weights[name] = value
    for i in range(recorded['config']['teacher']['layers']):
        for kind in ('weight', 'bias'):
            block = f'transformer.resblocks.{i}'
            parts = [weights.pop(f'{block}.self_attn.{part}_proj.{kind}') for part in 'qkv']
            weights[f'{block}.attn.in_proj_{kind}'] = torch.cat(parts)
    mean, std, own_mean, own_std = (torch.tensor(x) for x in (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD))
    shift = weights['conv1.weight'].sum((2, 3)) @ ((mean - own_mean) / own_std)
    weights['conv1.weight'] = weights['conv1.weight'] * (std / own_std)[:, None, None]
    weights['positional_embedding'] = weights['positional_embedding'].clone()
    weights['positional_embedding'][1:] += shift
    return weights | dict(proj=torch.eye(48)[:, :24])  # not used by this target


def student_weights(recorded: dict, prefix: str) -> dict[str, Tensor]:
    """Weights or gradient norms under our names: the encoder, and mixture and heads of the last two layers."""
    entries = strip_prefix(recorded, prefix)
    encoder = re.compile(r'(cls_token|pos_embed|patch_embed|blocks|norm)\b')
    weights = {key: value for key, value in entries.items() if encoder.match(key)}
    weights = convert(weights) if prefix == 'weight/' else rename(weights)
    mixture = entries['distill_weights']
    weights['neck.weights'] = mixture[2:] if mixture.ndim else mixture
    for i in (0, 1):
        for kind in ('weight', 'bias'):
            weights[f'neck.heads.{i}.{kind}'] = entries[f'distill_heads.{i + 2}.{kind}']
    return weights


def rename(norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient norms of a ViT in timm's layout under our names."""
    names = {'blocks.': 'layers.', '.norm': '.ln', 'mlp.fc1': 'ffn.layers.0.0', 'mlp.fc2': 'ffn.layers.1'}
    names['patch_embed.proj'] = 'patch_embed.projection'
    renamed = {}
    for key, value in norms.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[f'backbone.{key}'] = value
    return renamed


def alignment_cfg(recorded: dict, path: Path) -> dict:
    torch.save(clip_weights(recorded) | openai_numbers(), path)
    arch = dict(embed_dims=32, num_layers=4, num_heads=4, feedforward_channels=128)
    return dict(
        type='mmmilan.MILAN',
        backbone=dict(type='mmmilan.MILANViT', arch=arch, img_size=64, patch_size=16, out_indices=(0, 1, 2, 3)),
        masking=dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75),
        neck=dict(type='mmmilan.LayerMixture', embed_dim=32, num_layers=4, num_targets=2, predict_feature_dim=96),
        head=dict(
            type='mmmilan.LayerAlignment',
            num_layers=2,
            teacher=dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(path), head_width=16, teacher_mean_std=None),
        ),
    )


@pytest.fixture
def model(recorded, tmp_path) -> MILAN:
    return MODELS.build(alignment_cfg(recorded, tmp_path / 'clip.pt'))


def test_loss_and_gradient_norms(recorded, model):
    weights = student_weights(recorded, 'weight/')
    assert model.load_state_dict(weights) == ([], [])
    mask = torch.ones(3, 16, dtype=torch.bool).scatter_(1, recorded['ids_keep'], False)
    result = model.reconstruct(recorded['input'], model.supplied_patches([DataSample().set_mask(row) for row in mask]))
    assert relative_error(result.importance, recorded['importance']) < 1e-5
    loss = result.image_loss.mean()
    assert abs(loss.item() / recorded['loss'].item() - 1) < 1e-5
    loss.backward()
    norms = {name: gradient.double().norm() for name, gradient in gradients(model).items()}
    expected = student_weights(recorded, 'grad_norm/')
    assert norms.keys() == expected.keys()
    for name, norm in expected.items():
        assert abs(norms[name] / norm - 1) < 1e-5, name


def test_mixture_starts_as_the_mean_of_the_layers(model):
    model.init_weights()
    assert torch.equal(model.neck.weights, torch.full((2, 4), 0.25))
    layers = torch.randn(4, 2, 5, 32)
    pred = model.neck(layers, None, None)
    assert torch.allclose(pred[..., :48], model.neck.heads[0](layers.mean(0)), atol=1e-5)


def test_features_are_those_of_the_last_layer(model):
    model.init_weights()
    features = model.extract_feat(torch.randn(2, 3, 64, 64))
    assert len(features) == 4 and features[-1].shape == (2, 32)
    assert torch.allclose(features[-1].mean(1), torch.zeros(2), atol=1e-5)  # the final norm is applied


def test_refused_numbers_of_layers(recorded, tmp_path):
    cfg = alignment_cfg(recorded, tmp_path / 'clip.pt')
    cfg['backbone']['out_indices'] = (2, 3)
    with pytest.raises(
        InputError, match='number of backbone.out_indices is 2, but the other parts of the model need 4'
    ):
        MODELS.build(cfg)
    cfg['backbone']['out_indices'] = (0, 1, 2, 3)
    cfg['head']['num_layers'] = 5
    cfg['neck']['predict_feature_dim'] = 240
    model = MODELS.build(cfg)
    with pytest.raises(InputError, match='The teacher has blocks 0 to 3'):
        model.loss(torch.randn(1, 3, 64, 64))
