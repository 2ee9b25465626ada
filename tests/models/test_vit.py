"""Initialisation of the encoder, and its attention."""

from __future__ import annotations

import torch

from helpers import TINY_ARCH
from mmmilan.checkpoints.positions import sincos_position_embedding
from mmmilan.models.vit import MILANViT, last_attention
from mmmilan.registry import MODELS


def test_positions_start_as_sine_and_cosine(milan_cfg):
    """They are fixed, where mmpretrain's ViT draws them at random."""
    model = MODELS.build(milan_cfg)
    model.init_weights()
    expected = sincos_position_embedding((4, 4), 48)
    assert torch.equal(model.backbone.pos_embed, expected) and not model.backbone.pos_embed.requires_grad
    assert expected.std() > 0.4  # random ones would have 0.02


def test_linear_layers_start_as_maes(milan_cfg):
    """Xavier uniform: ±√(6 / (rows + columns)), and zero biases."""
    encoder = MODELS.build(milan_cfg).backbone
    encoder.init_weights()
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name


def test_attention_of_blocks_without_bias():
    """As that of a bias of zeros."""
    with_bias, without = (MILANViT(TINY_ARCH, img_size=32, patch_size=8, qkv_bias=bias) for bias in (True, False))
    with_bias.load_state_dict(without.state_dict(), strict=False)
    for layer in with_bias.layers:
        layer.attn.qkv.bias.data.zero_()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(last_attention(without, images), last_attention(with_bias, images), rtol=0, atol=1e-6)
