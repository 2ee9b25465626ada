"""Patches and positions as token sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, N, C] at index [B·K, T] -> [B·K, T, C].

    K rows of the index, one after the other, belong to the same image, whose tokens are not copied; a batch of one
    serves all rows.
    """
    rows = index.reshape(len(tokens), -1, 1).expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, rows).view(*index.shape, tokens.shape[-1])


def sincos_position_embedding(grid: tuple[int, int], embed_dims: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [1, 1 + rows · columns, embed_dims] of a grid, zeros for the class token.

    The first half of the channels encodes the column, the second the row, each as sines then cosines of
    embed_dims / 4 wavelengths up to 10000 (MAE, and the published code of MILAN).
    """
    frequencies = 10000.0 ** -(torch.arange(embed_dims // 4, dtype=torch.float64) / (embed_dims // 4))
    angles = torch.arange(max(grid), dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[: grid[0], None], axis[None, : grid[1]]
    patches = torch.cat([columns.expand(grid[0], -1, -1), rows.expand(-1, grid[1], -1)], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, embed_dims), patches.float()])[None]
