"""DenseViT against recorded results of hustvl/MIMDet and implus/mae_segmentation (tests/data/README.md)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor

from helpers import ROOT, relative_error, strip_prefix
from mmmilan.checkpoints.layouts import convert
from mmmilan.models import DenseViT
from mmmilan.registry import MODELS

CONFIGS = dict(
    mimdet='detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py',
    mae_segmentation='segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py',
)
PATCH = 'patch_embed.proj.weight'
# New layers: their names in the two repositories, and ours.
NAMES = {
    'ms_adaptor.': 'scales.',
    'fpn1.': 'scales.0.',
    'fpn2.0.': 'scales.1.',
    'windowed_rel_pos_bias.relative_position_bias_table': 'rel_pos_shared.windows',
    'global_rel_pos_bias.relative_position_bias_table': 'rel_pos_shared.global',
    '.gamma_1': '.attn.gamma1.weight',
    '.gamma_2': '.ffn.gamma2.weight',
    '.attn.relative_position_bias_table': '.attn.rel_pos_table',
    'blocks.': 'layers.',
}


def our_weights(key: str, value: Tensor) -> dict[str, Tensor]:
    """One of their weights under our name and in our shape."""
    if any(part in key for part in ('ms_adaptor', 'fpn', 'rel_pos', 'gamma_', 'relative_position')):
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        if 'rel_pos' not in key:
            return {key: value}
        # one row for each difference of positions, then three rows of the class token if the model has one
        side = int(len(value) ** 0.5)
        table, of_class = value[: side**2].T.unflatten(1, (side, side)), value[side**2 :].T
        return {key: table} | ({key.replace('table', 'cls'): of_class} if of_class.numel() else {})
    converted = convert({PATCH: torch.zeros(1), key: value}, to='mmmilan')  # it recognises a ViT by its first layer
    return {name.removeprefix('backbone.'): weight for name, weight in converted.items() if weight is value}


@pytest.fixture(params=CONFIGS)
def recorded(request):
    with np.load(ROOT / f'tests/data/{request.param}_tiny.npz') as file:
        values = {key: torch.from_numpy(file[key]) for key in file.files if key != 'config'}
        return values | dict(config=json.loads(str(file['config'])), config_file=CONFIGS[request.param])


def build(recorded: dict) -> DenseViT:
    """The encoder of our config in the sizes of the record."""
    cfg = Config.fromfile(ROOT / 'configs' / recorded['config_file'])
    init_default_scope(cfg.default_scope)
    sizes = recorded['config']
    arch = dict(
        embed_dims=sizes['embed_dim'],
        num_layers=sizes['depth'],
        num_heads=sizes['num_heads'],
        feedforward_channels=4 * sizes['embed_dim'],
    )
    blocks = tuple(range(sizes['depth']))  # four blocks: each is the last of its quarter
    cfg.model.backbone.update(arch=arch, img_size=sizes['img_size'], patch_size=sizes['patch_size'], init_cfg=None)
    cfg.model.backbone.update(out_indices=blocks)
    if 'window' in sizes:
        cfg.model.backbone.update(window_size=sizes['window'], global_indices=blocks)
    return MODELS.build(cfg.model.backbone)


def load(model: DenseViT, recorded: dict) -> dict[str, list[str]]:
    """Load their weights into the model; returns our names of each of their weights."""
    names, weights = {}, {}
    for key, value in recorded.items():
        if key.startswith('weight/'):
            ours = our_weights(key[7:], value)
            names[key[7:]] = list(ours)
            weights |= ours
    missing, unused = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {'scales.0.1.running_mean', 'scales.0.1.running_var', 'scales.0.1.num_batches_tracked'}
    assert set(unused) <= {'rel_pos_shared.windows'}  # no block of the record has windows
    return names


def test_maps_and_gradient_norms(recorded):
    model = build(recorded)
    names = load(model, recorded)
    # batch statistics in mae_segmentation's BatchNorm; no stochastic depth in either
    model.train('fpn1.1.weight' in names)
    for layer in model.layers:
        layer.attn.out_drop = layer.ffn.dropout_layer = torch.nn.Identity()
    maps = model(recorded['input'])
    for i, result in enumerate(maps):
        assert relative_error(result, recorded[f'map/s{i}']) < 1e-5
    sum((result * recorded[f'cotangent/s{i}']).sum() / 1000 for i, result in enumerate(maps)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = strip_prefix(recorded, 'grad_norm/')
    for key, norm in norms.items():
        result = torch.cat([gradients.pop(name).flatten() for name in names[key]]).double().norm()
        if key == 'fpn1.0.bias':  # a BatchNorm follows: its gradient is rounding error
            assert norm < 1e-6 and result < 1e-6
        else:
            assert abs(result - norm) < 1e-5 * norm, key
    assert not gradients


def test_initial_positions():
    """MIMDet does not take the positions of the checkpoint; the record has its initial ones."""
    with np.load(ROOT / 'tests/data/mimdet_tiny.npz') as file:
        expected = torch.from_numpy(file['weight/pos_embed'])
        model = build(dict(config=json.loads(str(file['config'])), config_file=CONFIGS['mimdet']))
    model.init_weights()
    torch.testing.assert_close(model.pos_embed.data, expected, rtol=0, atol=1e-6)
    assert model.pos_embed.requires_grad
    assert not any(table.any() for table in model.rel_pos_shared.values())
