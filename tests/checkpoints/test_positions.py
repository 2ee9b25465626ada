"""Positions of a grid that is no square, loaded into encoders of other grids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models import VisionTransformer
from torch import Tensor, nn

from helpers import TINY_ARCH
from mmmilan.checkpoints.loading import load_weights
from mmmilan.checkpoints.positions import grid_of, sincos_position_embedding
from mmmilan.models import DenseViT, MILANViT

ENCODERS = {
    'MILANViT': lambda size: MILANViT(TINY_ARCH, img_size=size),
    'VisionTransformer': lambda size: VisionTransformer(TINY_ARCH, img_size=size, patch_size=16),
    'DenseViT': lambda size: DenseViT(TINY_ARCH, img_size=size, out_indices=(0, 0, 1, 1)),
    'without class token': lambda size: DenseViT(
        TINY_ARCH, img_size=size, out_indices=(0, 0, 1, 1), with_cls_token=False
    ),
}


def pixels(grid: tuple[int, int]) -> tuple[int, int]:
    return 16 * grid[0], 16 * grid[1]


def pretrained(grid: tuple[int, int]) -> dict[str, Tensor]:
    vit = MILANViT(TINY_ARCH, img_size=pixels(grid))
    vit.init_weights()
    return vit.state_dict()


def interpolated(grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Sine-cosine positions of the patches of a grid, interpolated to another one."""
    stored = sincos_position_embedding(grid, 48)[:, 1:].transpose(1, 2).unflatten(2, grid)
    return F.interpolate(stored, size=to, mode='bicubic').flatten(2).transpose(1, 2)


@pytest.mark.parametrize('name', ENCODERS)
@pytest.mark.parametrize(
    ('grid', 'to'),
    [
        ((2, 4), (4, 4)),  # refused before
        ((2, 4), (4, 2)),  # the number of patches is the same
        ((2, 8), (4, 4)),
        ((4, 4), (2, 8)),
        ((2, 4), (4, 8)),  # 1 + 2 * 4 is a square
        ((4, 6), (5, 5)),  # 1 + 4 * 6 is the number of the other patches
    ],
)
def test_another_grid(name, grid, to):
    encoder = ENCODERS[name](pixels(to))
    load_weights(encoder, pretrained(grid), 'start.pth')
    torch.testing.assert_close(encoder.pos_embed[:, encoder.num_extra_tokens :], interpolated(grid, to))


@pytest.mark.parametrize('name', ENCODERS)
@pytest.mark.parametrize('grid', [(2, 4), (2, 8), (4, 4)])
def test_the_same_grid(name, grid):
    encoder = ENCODERS[name](pixels(grid))
    load_weights(encoder, pretrained(grid), 'start.pth')
    assert torch.equal(encoder.pos_embed[:, encoder.num_extra_tokens :], sincos_position_embedding(grid, 48)[:, 1:])


def test_the_encoder_of_a_whole_model():
    model = nn.Module()
    model.backbone = ENCODERS['VisionTransformer'](pixels((4, 2)))
    load_weights(model, {f'backbone.{key}': value for key, value in pretrained((2, 4)).items()}, 'start.pth')
    torch.testing.assert_close(model.backbone.pos_embed[:, 1:], interpolated((2, 4), (4, 2)))


def test_positions_that_were_trained_stay():
    """Of 16 positions nobody knows the grid: they are the encoder's, as those of its own checkpoints are."""
    weights = pretrained((2, 8)) | {'pos_embed': torch.randn(1, 17, 48)}
    encoder = ENCODERS['DenseViT'](pixels((2, 8)))
    load_weights(encoder, weights, 'own.pth')
    assert torch.equal(encoder.pos_embed, weights['pos_embed'])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('grid', [(1, 1), (1, 6), (2, 8), (8, 2), (4, 4), (14, 14), (14, 16)])
def test_grid_of(grid, dtype):
    positions = sincos_position_embedding(grid, 48).to(dtype)
    assert grid_of(positions) == grid_of(positions[:, 1:]) == grid
    assert grid_of(positions + 0.1) is None
    assert grid_of(positions[..., :6]) is None  # of no width that sines and cosines have


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert grid_of(sincos_position_embedding((2, 4), 48).float()) == (2, 4)
    finally:
        torch.set_default_dtype(torch.float32)
