"""Attention in windows and over whole images, with relative positions, against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import randomise
from mmmilan.models.window_attention import WindowAttention, relative_position_bias


def slow_attention(
    attention: WindowAttention, tokens: Tensor, grid: tuple[int, int], side: int, table: Tensor, cls_bias: Tensor | None
) -> Tensor:
    """A loop over images, windows and queries. Windows are cut at the border, not padded."""
    heads, width = attention.num_heads, tokens.shape[-1] // attention.num_heads
    middle, extra = table.shape[1] // 2, 0 if cls_bias is None else 1
    result = torch.zeros_like(tokens)
    corners = [(i, j) for i in range(0, grid[0], side) for j in range(0, grid[1], side)]
    for image, x in enumerate(tokens):
        for top, left in corners:
            rows, columns = range(top, min(top + side, grid[0])), range(left, min(left + side, grid[1]))
            inside = [None] * extra + [(i, j) for i in rows for j in columns]  # None: the class token
            index = [0 if at is None else extra + at[0] * grid[1] + at[1] for at in inside]
            query, key, value = attention.qkv(x[index]).chunk(3, dim=-1)
            for n, of_query in enumerate(inside):
                outputs = []
                for head in range(heads):
                    part = slice(head * width, (head + 1) * width)
                    scores = key[:, part] @ query[n, part] / math.sqrt(width)
                    for m, of_key in enumerate(inside):
                        if of_query and of_key:
                            offset = [at - to + middle for at, to in zip(of_query, of_key, strict=True)]
                            scores[m] += table[head, offset[0], offset[1]]
                        else:
                            scores[m] += cls_bias[head, 1 if of_query else 0 if of_key else 2]
                    outputs.append(scores.softmax(dim=0) @ value[:, part])
                share = 1 if of_query else len(corners)  # the class token is in each window: the mean
                result[image, index[n]] += attention.proj(torch.cat(outputs)) / share
    return attention.gamma1(result)


GRIDS = [(6, 6), (5, 7), (3, 4), (2, 2)]  # whole windows, windows cut at the border, a grid smaller than a window


@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_windows_equal_a_slow_loop(grid):
    attention = randomise(WindowAttention(24, 3, window_size=3, rel_pos_grid=(3, 3), layer_scale_init_value=0.5))
    tokens = torch.randn(2, 1 + grid[0] * grid[1], 24)
    with torch.no_grad():
        expected = slow_attention(attention, tokens, grid, 3, attention.rel_pos_table, attention.rel_pos_cls)
        torch.testing.assert_close(attention(tokens, grid), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_windows_without_class_token_equal_a_slow_loop(grid):
    """As in MIMDet: patches alone, and a table that is passed in because blocks share it."""
    attention = randomise(WindowAttention(24, 3, window_size=3, with_cls_token=False))
    tokens, table = torch.randn(2, grid[0] * grid[1], 24), torch.randn(3, 5, 5)
    with torch.no_grad():
        expected = slow_attention(attention, tokens, grid, 3, table, None)
        torch.testing.assert_close(attention(tokens, grid, table), expected, rtol=0, atol=1e-5)


def test_global_attention_equals_a_slow_loop():
    attention = randomise(WindowAttention(24, 3, rel_pos_grid=(4, 4)))
    tokens = torch.randn(1, 17, 24)
    with torch.no_grad():
        expected = slow_attention(attention, tokens, (4, 4), 4, attention.rel_pos_table, attention.rel_pos_cls)
        torch.testing.assert_close(attention(tokens, (4, 4)), expected, rtol=0, atol=1e-5)


def test_windows_without_bias_ignore_padding():
    """Without a bias, the padding needs a mask of its own. A single window over the whole grid is global attention."""
    attention = randomise(WindowAttention(24, 3, window_size=5))
    everywhere = WindowAttention(24, 3).eval()
    everywhere.load_state_dict(attention.state_dict())
    tokens = torch.randn(2, 1 + 3 * 4, 24)
    torch.testing.assert_close(attention(tokens, (3, 4)), everywhere(tokens, (3, 4)), rtol=0, atol=1e-5)


def test_relative_positions_at_other_sizes():
    def bias_of(rows: int, columns: int) -> Tensor:
        bias = relative_position_bias(table, (rows, columns), torch.float32)
        return bias.unflatten(1, (rows, columns)).unflatten(3, (rows, columns))

    table = torch.randn(3, 7, 7)
    bias = bias_of(4, 4)
    assert torch.equal(bias[:, 3, 0, 0, 3], table[:, 6, 0])  # unchanged at the size of the table
    assert torch.equal(bias[:, 0, 1, 2, 0], table[:, 1, 4])
    bias = bias_of(6, 3)
    torch.testing.assert_close(bias[:, 2, 1, 2, 1], table[:, 3, 3])  # the center stays the center
    torch.testing.assert_close(bias[:, 5, 2, 3, 1], bias[:, 2, 1, 0, 0])  # only the offset counts
    table = torch.arange(7.0)[:, None].expand(3, 7, 7)  # rises over the rows
    bias = bias_of(6, 6)[0]
    assert (bias[1:, 0, 0, 0] > bias[:-1, 0, 0, 0]).all()
    torch.testing.assert_close(bias[3, 0, 0, 5], bias[3, 0, 0, 0])
