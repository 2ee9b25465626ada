"""LARS without waiting for the device takes mmpretrain's steps."""

from __future__ import annotations

import pytest
import torch
from mmpretrain.engine.optimizers import LARS as MMPretrainLARS
from torch import nn

from mmmilan.engine import LARS

SETTINGS = [
    dict(momentum=0.9),
    dict(momentum=0.9, weight_decay=0.1, nesterov=True),
    dict(momentum=0.5, dampening=0.3, weight_decay=0.1),
    dict(weight_decay=0.1, eta=0.02),
]


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_same_steps(settings):
    weights = []
    for optimizer in (LARS, MMPretrainLARS):
        torch.manual_seed(0)
        weight, bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.zeros(5))  # whose norm is zero at first
        excluded, unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
        groups = [dict(params=[weight, bias, unused]), dict(params=[excluded], lars_exclude=True)]
        steps = optimizer(groups, lr=0.7, **settings)
        for _ in range(4):
            steps.zero_grad()
            (weight @ torch.randn(7) + bias).square().sum().backward()
            (excluded * torch.randn(3)).sum().backward()
            steps.step()
        weights.append([weight, bias, excluded, unused])
    for actual, expected in zip(*weights, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights[0][0], torch.zeros(5, 7))
