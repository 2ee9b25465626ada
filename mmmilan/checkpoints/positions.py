"""Positions of patches: the fixed sines and cosines of MAE and MILAN, and their way to another grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmmilan.errors import InputError


def sincos_position_embedding(grid: tuple[int, int], embed_dims: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [1, 1 + rows · columns, embed_dims] of a grid, zeros for the class token.

    The first half of the channels encodes the column, the second the row, each as sines then cosines of
    embed_dims / 4 wavelengths up to 10000 (MAE, and the published code of MILAN).

    Raises:
        InputError: ``embed_dims`` is not a multiple of 4.
    """
    if embed_dims % 4:
        raise InputError(
            f'Sine-cosine positions need a width that is a multiple of 4, which {embed_dims} is not; change embed_dims '
            'of the backbone, or decoder_embed_dim of the neck.'
        )
    frequencies = 10000.0 ** -(torch.arange(embed_dims // 4, dtype=torch.float64) / (embed_dims // 4))
    angles = torch.arange(max(grid), dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[: grid[0], None], axis[None, : grid[1]]
    patches = torch.cat([columns.expand(grid[0], -1, -1), rows.expand(-1, grid[1], -1)], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, embed_dims), patches.float()])[None]


def grid_of(positions: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the grid that sine-cosine positions [1, N or 1 + N, D] are of; None if they are others."""
    width = positions.shape[-1]
    for extra in (1, 0) if width % 4 == 0 else ():
        patches = positions[0, extra:].float()
        for rows in (each for each in range(1, len(patches) + 1) if len(patches) % each == 0):
            grid = (rows, len(patches) // rows)
            expected = sincos_position_embedding(grid, width)[0, 1:].to(patches)
            if torch.allclose(patches, expected, rtol=0, atol=0.01):  # as float16 and bfloat16 hold them, too
                return grid
    return None


def fit_positions(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a model, with sine-cosine positions of another grid interpolated to the one of its encoder.

    mmpretrain takes positions to be of a square, and leaves them alone if the encoder has as many: 4 x 8 patches in
    8 x 4, say.
    """
    from mmpretrain.models import VisionTransformer
    from mmpretrain.models.utils import resize_pos_embed

    fitted = dict(weights)
    for name, part in model.named_modules():
        key = f'{name}.pos_embed' if name else 'pos_embed'
        if isinstance(part, VisionTransformer) and key in weights and (grid := grid_of(weights[key])):
            extra = weights[key].shape[1] - math.prod(grid)
            fitted[key] = resize_pos_embed(weights[key], grid, part.patch_resolution, part.interpolate_mode, extra)
    return fitted
