"""The learning rate and weight decay of every parameter of the three tasks' real models."""

from __future__ import annotations

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from helpers import check_layer_decay
from mmmilan.errors import InputError
from mmmilan.registry import MODELS

# config, blocks, decay, learning rate and weight decay of the paper's appendix A.1
RECIPES = [
    ('milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py', 12, 0.65, 4e-4, 0.05),
    ('detection/mask-rcnn_vit-base-p16_milan-pre_1x_coco.py', 12, 0.75, 2e-4, 0.1),
    ('detection/mask-rcnn_vit-large-p16_milan-pre_1x_coco.py', 24, 0.85, 2e-4, 0.1),
    ('segmentation/upernet_vit-base-p16_milan-pre_160k_ade20k-512x512.py', 12, 0.9, 3e-5, 0.05),
    ('segmentation/upernet_vit-large-p16_milan-pre_160k_ade20k-512x512.py', 24, 0.9, 3e-5, 0.05),
]
CONSTRUCTOR = 'mmmilan.LayerDecayOptimWrapperConstructor'


@pytest.mark.parametrize('recipe', RECIPES, ids=[recipe[0] for recipe in RECIPES])
def test_every_parameter(recipe):
    check_layer_decay(*recipe)


def test_every_parameter_of_a_classifier_with_our_constructor():
    check_layer_decay(*RECIPES[0], constructor=CONSTRUCTOR)


@pytest.mark.parametrize(('optimizer', 'weight_decay'), [('AdamW', 0.01), ('SGD', 0.0), ('Rprop', 0.0)])
def test_optimizer_without_weight_decay(optimizer, weight_decay, milan_cfg):
    """It keeps its own default, and the learning rates decay all the same."""
    model = MODELS.build(milan_cfg)
    optim_wrapper = dict(optimizer=dict(type=optimizer, lr=0.1), constructor=CONSTRUCTOR)
    optim_wrapper['paramwise_cfg'] = dict(layer_decay_rate=0.5)
    groups = build_optim_wrapper(model, optim_wrapper).optimizer.param_groups
    assert {round(group['lr'], 9) for group in groups} == {0.1, 0.05, 0.025, 0.0125}
    assert {group['weight_decay'] for group in groups} == {weight_decay}


def test_only_for_a_vit():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3), constructor=CONSTRUCTOR)
    with pytest.raises(InputError, match='needs a ViT as backbone of Module, not Linear'):
        build_optim_wrapper(model, optim_wrapper | dict(paramwise_cfg=dict(layer_decay_rate=0.5)))
