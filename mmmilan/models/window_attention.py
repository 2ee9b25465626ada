"""Self-attention within windows of a grid of patches, with learned relative positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmpretrain.models.utils import MultiheadAttention
from torch import Tensor, nn


def partition_windows(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut grids [B, H, W, D], padded with zeros below and on the right, into windows [B, K, h·w, D] of ``size``."""
    height, width = size
    patches = F.pad(patches, (0, 0, 0, -patches.shape[2] % width, 0, -patches.shape[1] % height))
    windows = patches.unflatten(1, (-1, height)).unflatten(3, (-1, width)).transpose(2, 3)
    return windows.flatten(3, 4).flatten(1, 2)


def merge_windows(windows: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The reverse of ``partition_windows``: windows [B, K, h·w, D] to grids [B, H, W, D], without the padding."""
    rows = -(-grid[0] // size[0])
    patches = windows.unflatten(1, (rows, -1)).unflatten(3, size).transpose(2, 3)
    return patches.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]]


def relative_position_bias(
    table: Tensor, size: tuple[int, int], dtype: torch.dtype, cls_bias: Tensor | None = None
) -> Tensor:
    """What the relative position of query and key adds to their score, for all pairs in a window.

    Args:
        table: Learned bias [heads, 2H - 1, 2W - 1] by the difference of rows and columns, query minus key, the
            difference of zero in the middle. It is interpolated to windows of another size.
        size: Rows h and columns w of the window.
        dtype: Type of the result.
        cls_bias: Learned bias [heads, 3] of the class token, which has no position: class token to patch, patch to
            class token, class token to itself. None where there is no class token.

    Returns:
        Bias [heads, h·w, h·w], with a class token [heads, 1 + h·w, 1 + h·w].
    """
    shape = tuple(2 * side - 1 for side in size)
    if tuple(table.shape[1:]) != shape:
        table = F.interpolate(table[None], size=shape, mode='bicubic', align_corners=False)[0]
    # a query in row i sees the rows i to i + h - 1 of the table, for the keys from the last row to the first
    windows = table.to(dtype).unfold(1, size[0], 1).unfold(2, size[1], 1)
    bias = windows.flip(3, 4).flatten(3, 4).flatten(1, 2)
    if cls_bias is None:
        return bias
    cls_to_patch, patch_to_cls, cls_to_cls = cls_bias.to(dtype)[:, None].split(1, dim=2)
    cls_row = torch.cat([cls_to_cls, cls_to_patch.expand(-1, -1, bias.shape[1])], dim=2)
    bias = torch.cat([patch_to_cls.expand(-1, bias.shape[1], -1), bias], dim=2)
    return torch.cat([cls_row, bias], dim=1)


class WindowAttention(MultiheadAttention):
    """mmpretrain's self-attention, with its keys, within windows of the grid of patches.

    A class token is in every window, as one more query and key; what it collects in the windows is averaged. With a
    single window this is plain global attention.

    Args:
        window_size: Side of a window in patches; 0 for a single window, the whole grid (global attention).
        rel_pos_grid: Rows and columns that the block's own relative position bias is made for; None for no own bias.
        with_cls_token: Whether the first token is a class token.
    """

    def __init__(
        self,
        *args,
        window_size: int = 0,
        rel_pos_grid: tuple[int, int] | None = None,
        with_cls_token: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.window_size = window_size
        self.num_extra_tokens = int(with_cls_token)
        self.rel_pos_table = self.rel_pos_cls = None
        if rel_pos_grid:
            rows, columns = rel_pos_grid
            self.rel_pos_table = nn.Parameter(torch.zeros(self.num_heads, 2 * rows - 1, 2 * columns - 1))
            if with_cls_token:
                self.rel_pos_cls = nn.Parameter(torch.zeros(self.num_heads, 3))

    def forward(self, tokens: Tensor, grid: tuple[int, int], shared_table: Tensor | None = None) -> Tensor:
        """Attention among the tokens of each window.

        Args:
            tokens: Tokens [B, H·W, D] on a ``grid`` of (H, W), or [B, 1 + H·W, D] with a class token first.
            grid: Rows and columns of patches.
            shared_table: The relative position bias, by difference, that blocks share; see
                ``relative_position_bias``.

        Returns:
            Tokens of the same shape.
        """
        extra = self.num_extra_tokens
        size = (self.window_size, self.window_size) if self.window_size else grid
        windows = partition_windows(tokens[:, extra:].unflatten(1, grid), size)
        batch, count = windows.shape[:2]
        windows = torch.cat([tokens[:, None, :extra].expand(-1, count, -1, -1), windows], dim=2).flatten(0, 1)
        qkv = self.qkv(windows).unflatten(2, (3, self.num_heads, self.head_dims)).permute(2, 0, 3, 1, 4)
        table = self.rel_pos_table if shared_table is None else shared_table
        bias = None if table is None else relative_position_bias(table, size, qkv.dtype, self.rel_pos_cls)
        windows = F.scaled_dot_product_attention(
            *qkv,
            attn_mask=self.attention_mask(grid, size, batch, bias),
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        windows = self.proj(windows.transpose(1, 2).flatten(2)).unflatten(0, (batch, count))
        patches = merge_windows(windows[:, :, extra:], size, grid).flatten(1, 2)
        tokens = torch.cat([windows[:, :, :extra].mean(dim=1), patches], dim=1)
        return self.out_drop(self.gamma1(self.proj_drop(tokens)))

    def attention_mask(
        self, grid: tuple[int, int], size: tuple[int, int], batch: int, bias: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores of windows [B·K, heads, L, L], or which of the L keys are no padding."""
        mask = None if bias is None else bias[None]
        if grid[0] % size[0] or grid[1] % size[1]:
            inside = torch.ones(1, *grid, 1, dtype=torch.bool, device=self.proj.weight.device)
            inside = partition_windows(inside, size)[0, :, None, None, :, 0]
            inside = F.pad(inside, (self.num_extra_tokens, 0), value=True)
            mask = inside if mask is None else mask.masked_fill(~inside, -torch.inf)
            mask = mask.repeat(batch, 1, 1, 1)
        return mask
