"""MILAN against the published implementation's recorded results (tests/data/official_tiny.npz)."""

from __future__ import annotations

import pytest
import torch
from mmpretrain.structures import DataSample

from helpers import gradients, openai_numbers, relative_error, strip_prefix
from mmmilan.checkpoints.layouts import convert
from mmmilan.checkpoints.positions import sincos_position_embedding
from mmmilan.registry import MODELS


@pytest.fixture
def model(official, milan_cfg):
    model = MODELS.build(milan_cfg)
    weights = strip_prefix(official, 'milan/')
    model.load_state_dict(convert(weights, to='mmmilan'))
    return model


@pytest.fixture
def data_samples(official):
    return [DataSample().set_mask(mask.bool()) for mask in official['mask']]


def test_teacher(official, model):
    features, importance = model.head.run_teacher(official['input'])
    assert relative_error(features, official['clip_features']) < 1e-5
    assert relative_error(importance, official['importance']) < 1e-5


def test_encoder(official, model):
    latent = model.backbone(official['input'], official['ids_keep'])
    assert relative_error(latent, official['latent']) < 1e-5


def test_predictions(official, model):
    visible, masked = official['ids_keep'], official['ids_mask']
    pred = model.neck(official['latent'], visible, masked)
    image_order = torch.empty_like(pred)
    image_order[:, 0] = pred[:, 0]
    index = 1 + torch.cat([visible, masked], dim=1)
    image_order.scatter_(1, index[..., None].expand_as(pred[:, 1:]), pred[:, 1:])
    assert relative_error(image_order, official['pred']) < 1e-5


def test_loss_and_gradient_norms(official, model, data_samples):
    loss = model.loss(official['input'], data_samples)['loss']
    assert relative_error(loss, official['loss']) < 1e-5
    loss.backward()
    norms = {name: gradient.double().norm() for name, gradient in gradients(model).items()}
    recorded = {key: norm[None] for key, norm in strip_prefix(official, 'grad_norm/').items()}
    recorded = convert(recorded, to='mmmilan')  # it maps keys, so it converts norms as well as weights
    assert norms.keys() == recorded.keys()
    for name, norm in recorded.items():
        assert relative_error(norms[name], norm[0]) < 1e-5, name


def test_positions(official):
    for key in ('milan/pos_embed', 'milan/decoder_pos_embed'):
        positions = sincos_position_embedding((4, 4), official[key].shape[-1])
        assert relative_error(positions, official[key]) < 1e-6


@pytest.mark.parametrize('layout', ['state dict', 'whole CLIP', 'TorchScript', 'half precision'])
def test_teacher_file_layouts(official, layout, tmp_path):
    """The features are the same from each layout of the file."""
    weights = strip_prefix(official, 'clip/')
    if layout == 'state dict':
        weights = {key.removeprefix('visual.'): value for key, value in weights.items()}
    if layout == 'whole CLIP':
        weights |= {'positional_embedding': torch.zeros(77, 8), 'text_projection': torch.zeros(8, 24)}
        weights |= {'transformer.resblocks.0.ln_1.weight': torch.zeros(8), 'logit_scale': torch.zeros(())}
    if layout == 'half precision':
        weights = {key: value.half() for key, value in weights.items()}
    weights |= openai_numbers()
    path = tmp_path / 'clip.pt'
    if layout == 'TorchScript':
        torch.jit.save(torch.jit.script(as_module(weights)), path)
    else:
        torch.save(weights, path)
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(path), teacher_mean_std=None)).eval()
    features, _ = teacher(official['input'])
    assert (teacher.feature_dim, teacher.num_patches, teacher.patch_size) == (24, 16, 16)
    assert relative_error(features, official['clip_features']) < (2e-3 if layout == 'half precision' else 1e-5)


def as_module(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module with exactly this state dict."""
    root = torch.nn.Module()
    for key, value in weights.items():
        module = root
        *path, name = key.split('.')
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=value.is_floating_point()))
    return root
