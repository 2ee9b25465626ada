"""The learning rate and weight decay of every parameter of the three tasks' real models."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from mmmilan.errors import InputError
from mmmilan.registry import MODELS

# config, blocks, decay, learning rate and weight decay of the paper's appendix A.1
RECIPES = [
    ('milan/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py', 12, 0.65, 4e-4, 0.05),
    ('detection/mask-rcnn_milan_vit-base-p16_1x_coco.py', 12, 0.75, 2e-4, 0.1),
    ('detection/mask-rcnn_milan_vit-large-p16_1x_coco.py', 24, 0.85, 2e-4, 0.1),
    ('segmentation/upernet_milan_vit-base-p16_160k_ade20k-512x512.py', 12, 0.9, 3e-5, 0.05),
    ('segmentation/upernet_milan_vit-large-p16_160k_ade20k-512x512.py', 24, 0.9, 3e-5, 0.05),
]
CONSTRUCTOR = 'mmmilan.LayerDecayOptimWrapperConstructor'


def real_model(cfg: Config) -> nn.Module:
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize('recipe', RECIPES, ids=[recipe[0] for recipe in RECIPES])
def test_every_parameter(recipe):
    check(*recipe)


def test_every_parameter_of_a_classifier_with_our_constructor():
    check(*RECIPES[0], constructor=CONSTRUCTOR)


def check(
    path: str, blocks: int, decay: float, rate: float, weight_decay: float, constructor: str | None = None
) -> None:
    """lr · decay^(blocks + 1 - depth): 0 is what comes before the blocks, blocks + 1 what comes after."""
    cfg = Config.fromfile(ROOT / 'configs' / path)
    model = real_model(cfg)
    cfg.optim_wrapper.type = 'OptimWrapper'  # AmpOptimWrapper asks for a GPU
    cfg.optim_wrapper.constructor = constructor or cfg.optim_wrapper.constructor
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    groups = {id(group['params'][0]): group for group in optimizer.param_groups if len(group['params']) == 1}
    assert len(groups) == len(optimizer.param_groups)
    depths = set()
    for key, parameter in model.named_parameters():
        depth = blocks + 1
        if match := re.match(r'backbone\.layers\.(\d+)\.', key):
            depth = int(match[1]) + 1
        elif key.startswith(('backbone.patch_embed.', 'backbone.cls_token', 'backbone.pos_embed')):
            depth = 0
        group = groups.pop(id(parameter))
        assert group['lr'] == pytest.approx(rate * decay ** (blocks + 1 - depth), rel=1e-9), key
        spared = parameter.ndim == 1 or 'rel_pos' in key or key.endswith(('cls_token', 'pos_embed'))
        assert group['weight_decay'] == pytest.approx(0 if spared else weight_decay), key
        depths.add(depth)
    assert not groups and depths == set(range(blocks + 2))


def test_only_for_a_vit():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3), constructor=CONSTRUCTOR)
    with pytest.raises(InputError, match='needs a ViT as backbone of Module, not Linear'):
        build_optim_wrapper(model, optim_wrapper | dict(paramwise_cfg=dict(layer_decay_rate=0.5)))
