"""Against mmpretrain's MILAN and MAE: the same weights and masks give the same loss and gradients."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS as ROOT_MODELS
from mmpretrain.structures import DataSample
from torch import nn

from helpers import TINY_ARCH, openai_numbers, strip_prefix
from mmmilan.registry import MODELS

BACKBONE = dict(arch=TINY_ARCH, img_size=64, patch_size=16)
NECK = dict(num_patches=16, embed_dim=48, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)


@pytest.fixture
def images():
    return torch.randn(6, 3, 64, 64)


@pytest.fixture
def draws(monkeypatch):
    """The orders that mmpretrain draws: visible patches first, 4 of 16."""
    recorded = []

    def record(function):
        def recording(*args, **kwargs):
            recorded.append(function(*args, **kwargs))
            return recorded[-1]

        return recording

    monkeypatch.setattr(torch, 'multinomial', record(torch.multinomial))
    monkeypatch.setattr(torch, 'argsort', record(torch.argsort))
    return recorded


@pytest.fixture
def whole_clip_file(official, tmp_path):
    """The recorded visual tower with a text tower, which mmpretrain needs to read a CLIP."""
    generator = torch.Generator().manual_seed(0)
    weights = strip_prefix(official, 'clip/') | openai_numbers()
    shapes = dict(positional_embedding=(8, 64), text_projection=(64, 24))
    shapes |= {'token_embedding.weight': (10, 64), 'ln_final.weight': (64,), 'ln_final.bias': (64,)}
    shapes['transformer.resblocks.0.ln_1.weight'] = (64,)
    weights |= {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    torch.save(weights, tmp_path / 'whole_clip.pt')
    return str(tmp_path / 'whole_clip.pt')


def randomise(model: nn.Module) -> None:
    """Random weights, biases and norms included, so that each affects the result."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)


def masks(order: torch.Tensor) -> list[DataSample]:
    """Data samples that mask all but the first four patches of each order [B, 16]."""
    mask = torch.ones(order.shape, dtype=torch.bool).scatter_(1, order[:, :4], False)
    return [DataSample().set_mask(each) for each in mask]


def assert_same_loss_and_gradients(
    ours: nn.Module, theirs: nn.Module, loss: torch.Tensor, expected: torch.Tensor
) -> None:
    assert abs(loss - expected) < 1e-5 * abs(expected)
    loss.backward()
    expected.backward()
    theirs = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_milan(images, draws, whole_clip_file):
    cfg = dict(
        type='MILAN',
        backbone=dict(type='MILANViT', mask_ratio=0.75, **BACKBONE),
        neck=dict(type='MILANPretrainDecoder', predict_feature_dim=24, **NECK),
        head=dict(type='MIMHead', loss=dict(type='CosineSimilarityLoss', shift_factor=2.0, scale_factor=2.0)),
        target_generator=dict(type='CLIPGenerator', tokenizer_path=whole_clip_file),
    )
    theirs = ROOT_MODELS.build(dict(_scope_='mmpretrain', **cfg))
    randomise(theirs.backbone)
    randomise(theirs.neck)
    ours = MODELS.build(
        dict(
            type='mmmilan.MILAN',
            backbone=dict(type='mmmilan.MILANViT', **BACKBONE),
            masking=dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75),
            neck=dict(type='mmmilan.PromptingDecoder', predict_feature_dim=24, **NECK),
            head=dict(
                type='mmmilan.CLIPTarget',
                teacher=dict(type='mmmilan.OpenCLIPTeacher', pretrained=whole_clip_file, teacher_mean_std=None),
            ),
        )
    )
    weights = theirs.state_dict()
    ours.load_state_dict({key: value for key, value in weights.items() if not key.startswith('target_generator.')})

    features, attention = theirs.target_generator(images)
    target, importance = ours.head.run_teacher(images)
    assert (target - features).norm() < 1e-5 * features.norm()
    assert (importance - attention[:, 0, 1:]).norm() < 1e-5 * importance.norm()

    expected = theirs.loss(images, None)['loss']
    assert_same_loss_and_gradients(ours, theirs, ours.loss(images, masks(draws[0]))['loss'], expected)


@pytest.mark.parametrize('norm_pix', [True, False])
def test_mae(images, draws, norm_pix):
    loss = dict(type='PixelReconstructionLoss', criterion='L2')
    cfg = dict(
        type='MAE',
        backbone=dict(type='MAEViT', mask_ratio=0.75, **BACKBONE),
        neck=dict(type='MAEPretrainDecoder', patch_size=16, **NECK),
        head=dict(type='MAEPretrainHead', norm_pix=norm_pix, patch_size=16, loss=loss),
    )
    theirs = ROOT_MODELS.build(dict(_scope_='mmpretrain', **cfg))
    randomise(theirs)
    ours = MODELS.build(
        dict(
            type='mmmilan.MILAN',
            backbone=dict(type='mmmilan.MILANViT', **BACKBONE),
            masking=dict(type='mmmilan.RandomMasking', mask_ratio=0.75),
            neck=dict(type='mmmilan.MAEDecoder', predict_feature_dim=768, **NECK),
            head=dict(type='mmmilan.PixelTarget', norm_pix=norm_pix),
        )
    )
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.loss(images, None)['loss']
    order = draws[0]  # argsort of the noise; the second argsort is its inverse
    assert_same_loss_and_gradients(ours, theirs, ours.loss(images, masks(order))['loss'], expected)


def test_whole_images(images):
    """Without a mask, MILANViT is mmpretrain's VisionTransformer."""
    theirs = ROOT_MODELS.build(dict(type='mmpretrain.VisionTransformer', out_type='raw', **BACKBONE))
    ours = MODELS.build(dict(type='mmmilan.MILANViT', out_type='raw', **BACKBONE))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(images)[0], theirs(images)[0])
    everything = torch.arange(16).expand(6, -1)
    assert torch.allclose(ours(images, everything), theirs(images)[0], rtol=1e-5, atol=1e-5)
