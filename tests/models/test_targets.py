"""Sums of targets: weights and balance."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import assert_close, build_model, gradients
from mmmilan.errors import InputError
from mmmilan.models import MILAN
from mmmilan.registry import MODELS


def summed(milan_cfg: dict, **options: object) -> dict:
    """Features and pixels on one decoder."""
    cfg = copy.deepcopy(milan_cfg)
    pixels = dict(type='mmmilan.PixelTarget', norm_pix=True)
    cfg['head'] = dict(type='mmmilan.SumTarget', targets=[milan_cfg['head'], pixels], **options)
    cfg['neck']['predict_feature_dim'] = 24 + 768
    return cfg


def one_target(milan_cfg: dict, head: dict, whole: MILAN, part: slice) -> MILAN:
    """MILAN with one of the targets and the weights that ``whole`` has for it."""
    cfg = copy.deepcopy(milan_cfg) | dict(head=head)
    cfg['neck']['predict_feature_dim'] = part.stop - part.start
    model, weights = build_model(cfg), whole.state_dict()
    for kind in ('weight', 'bias'):
        weights[f'neck.decoder_pred.{kind}'] = weights[f'neck.decoder_pred.{kind}'][part]
    model.load_state_dict(weights)
    return model


def losses(model: MILAN, images: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return model.reconstruct(images).image_loss


def test_unbalanced_loss_is_the_weighted_sum(milan_cfg):
    images = torch.randn(3, 3, 64, 64)
    whole = build_model(summed(milan_cfg, weights=[2.0, 0.5], balance=False))
    features = one_target(milan_cfg, milan_cfg['head'], whole, slice(0, 24))
    head = dict(type='mmmilan.PixelTarget', norm_pix=True, teacher=milan_cfg['head']['teacher'])
    pixels = one_target(milan_cfg, head, whole, slice(24, 792))
    expected = 2 * losses(features, images) + 0.5 * losses(pixels, images)
    assert torch.allclose(losses(whole, images), expected, rtol=1e-5)


def test_balanced_loss_does_not_depend_on_the_scale_of_a_target():
    """Two squared errors, one of targets 100 times as large; φ² is tr(Σ) / C (PHI-S)."""
    head = MODELS.build(
        dict(
            type='mmmilan.SumTarget',
            targets=[
                dict(type='mmmilan.FeatureTarget', feature_dim=5),
                dict(type='mmmilan.FeatureTarget', feature_dim=7),
            ],
        )
    )
    pred, target = torch.randn(4, 9, 12), torch.randn(4, 9, 12) + 3
    _, loss = head.compare(pred, target, num_visible=3)
    scale = torch.cat([torch.full((5,), 100.0), torch.ones(7)])
    _, scaled = head.compare(scale * pred, scale * target, num_visible=3)
    assert torch.allclose(loss, scaled, rtol=1e-4)

    expected = 0
    for part in (slice(5), slice(5, None)):
        masked = target[:, 4:, part].flatten(0, 1)  # this target counts masked patches only
        phi_squared = torch.cov(masked.T, correction=0).trace() / masked.shape[1]
        expected += (pred[:, 4:, part] - target[:, 4:, part]).square().mean((1, 2)) / phi_squared
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_two_teachers_give_their_features_and_the_first_the_importance(milan_cfg):
    cfg = copy.deepcopy(milan_cfg)
    cfg['head'] = dict(type='mmmilan.SumTarget', targets=[milan_cfg['head'], milan_cfg['head']], balance=False)
    cfg['neck']['predict_feature_dim'] = 48
    model, images = build_model(cfg), torch.randn(2, 3, 64, 64)
    features, importance = model.head.run_teacher(images)
    single_features, single_importance = build_model(milan_cfg).head.run_teacher(images)
    assert torch.equal(importance, single_importance)
    assert torch.equal(model.head.target(images, features), torch.cat([single_features] * 2, dim=-1))
    assert not any('teacher' in key for key in model.state_dict())
    model.loss(images)['loss'].backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize('weight', [-1, float('nan'), float('inf')])
def test_a_weight_that_is_none(milan_cfg, weight):
    milan_cfg['head']['cls_token'] = weight
    with pytest.raises(InputError, match=f'head.cls_token={weight} is no weight; give a number from 0 on'):
        build_model(milan_cfg)


def test_class_token_counts_as_several_patches(milan_cfg):
    images = torch.randn(2, 3, 64, 64)
    milan_cfg['head']['cls_token'] = 3.0
    model = build_model(milan_cfg)
    torch.manual_seed(1)
    result = model.reconstruct(images)
    patches = result.token_loss[:, 1:].sum(1)
    assert torch.allclose(result.image_loss, (3 * result.token_loss[:, 0] + patches) / 19, rtol=1e-5)
    cfg = copy.deepcopy(milan_cfg)
    cfg['head'] = dict(type='mmmilan.SumTarget', targets=[milan_cfg['head']], balance=False)
    whole = build_model(cfg)
    for each in (model, whole):
        torch.manual_seed(1)
        each.loss(images)['loss'].backward()
    assert_close(gradients(whole), gradients(model))


def test_refused_targets(milan_cfg):
    with pytest.raises(InputError, match='head.weights has 3 numbers for 2 targets; give each target one'):
        build_model(summed(milan_cfg, weights=[1, 2, 3]))
    cfg = copy.deepcopy(milan_cfg)
    other = copy.deepcopy(milan_cfg['head'])
    other['teacher']['input_size'] = 128
    cfg['head'] = dict(type='mmmilan.SumTarget', targets=[milan_cfg['head'], other])
    with pytest.raises(
        InputError, match='teachers of head.targets see .16, 64. patches; set their input_size to agree'
    ):
        build_model(cfg)
