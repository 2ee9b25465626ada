"""The encoder for detection and segmentation: images of any size in, four feature maps out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmpretrain.models import VisionTransformer
from mmpretrain.models.utils import LayerNorm2d, MultiheadAttention, resize_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmilan.errors import InputError
from mmmilan.registry import MODELS


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


class WindowAttention(MultiheadAttention):
    """mmpretrain's self-attention, with its keys, within windows of the grid of patches.

    The class token was a part of every attention in pretraining. Here each window has it too, as one more query and
    key; what it collects in the windows is averaged. With a single window this is plain global attention.

    Args:
        window_size: Side of a window in patches; 0 for a single window, the whole grid (global attention).
        rel_pos_grid: Rows and columns that the learned relative position bias is made for; None for no bias.
    """

    def __init__(self, *args, window_size: int = 0, rel_pos_grid: tuple[int, int] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.window_size = window_size
        self.rel_pos_table = None
        if rel_pos_grid:
            rows, columns = rel_pos_grid
            self.rel_pos_table = nn.Parameter(torch.zeros(self.num_heads, 2 * rows - 1, 2 * columns - 1))
            # the class token has no position: class to patch, patch to class, class to class
            self.rel_pos_cls = nn.Parameter(torch.zeros(self.num_heads, 3))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens [B, 1 + H·W, D], class token first, on a ``grid`` of (H, W) -> the same shape."""
        size = (self.window_size, self.window_size) if self.window_size else grid
        windows = partition_windows(tokens[:, 1:].unflatten(1, grid), size)
        batch, count = windows.shape[:2]
        windows = torch.cat([tokens[:, None, :1].expand(-1, count, -1, -1), windows], dim=2).flatten(0, 1)
        qkv = self.qkv(windows).unflatten(2, (3, self.num_heads, self.head_dims)).permute(2, 0, 3, 1, 4)
        windows = F.scaled_dot_product_attention(
            *qkv,
            attn_mask=self.attention_mask(grid, size, batch, qkv.dtype),
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        windows = self.proj(windows.transpose(1, 2).flatten(2)).unflatten(0, (batch, count))
        patches = merge_windows(windows[:, :, 1:], size, grid).flatten(1, 2)
        tokens = torch.cat([windows[:, :, 0].mean(dim=1, keepdim=True), patches], dim=1)
        return self.out_drop(self.gamma1(self.proj_drop(tokens)))

    def attention_mask(
        self, grid: tuple[int, int], size: tuple[int, int], batch: int, dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to the scores of windows [B·K, heads, 1 + h·w, 1 + h·w], or which keys are none: padding."""
        mask = None
        if self.rel_pos_table is not None:
            mask = self.relative_position_bias(size).to(dtype)[None]
        if grid[0] % size[0] or grid[1] % size[1]:
            inside = torch.ones(1, *grid, 1, dtype=torch.bool, device=self.proj.weight.device)
            inside = F.pad(partition_windows(inside, size)[0, :, None, None, :, 0], (1, 0), value=True)
            mask = inside if mask is None else mask.masked_fill(~inside, -torch.inf)
            mask = mask.repeat(batch, 1, 1, 1)
        return mask

    def relative_position_bias(self, size: tuple[int, int]) -> Tensor:
        """The bias [heads, 1 + h·w, 1 + h·w] of query and key in a window, its table interpolated to ``size``."""
        table = self.rel_pos_table
        shape = tuple(2 * side - 1 for side in size)
        if tuple(table.shape[1:]) != shape:
            table = F.interpolate(table[None], size=shape, mode='bicubic', align_corners=False)[0]
        # a query in row i sees the rows i to i + h - 1 of the table, for the keys from the last row to the first
        bias = table.unfold(1, size[0], 1).unfold(2, size[1], 1).flip(3, 4).flatten(3, 4).flatten(1, 2)
        cls_to_patch, patch_to_cls, cls_to_cls = self.rel_pos_cls[:, None].split(1, dim=2)
        cls_row = torch.cat([cls_to_cls, cls_to_patch.expand(-1, -1, bias.shape[1])], dim=2)
        bias = torch.cat([patch_to_cls.expand(-1, bias.shape[1], -1), bias], dim=2)
        return torch.cat([cls_row, bias], dim=1)


@MODELS.register_module()
class DenseViT(VisionTransformer):
    """mmpretrain's ``VisionTransformer`` for dense prediction (Li et al., arXiv 2111.11429; MAE's UperNet).

    Its keys are those of ``MILANViT`` and mmpretrain's ViT, so their checkpoints load as they are, with
    ``init_cfg=dict(type='Pretrained', checkpoint=...)``. Relative positions, layer scale and the layers that rescale
    the maps are new.

    Args:
        arch: As in mmpretrain.
        img_size: Size in pixels that the absolute positions, and the relative ones of global blocks, are stored for;
            for other sizes they are interpolated.
        patch_size: Side of a patch in pixels.
        out_indices: The four blocks, from 0, whose outputs become the maps at 4, 2, 1 and 1/2 times the
            resolution of the patches.
        window_size: Side in patches of the windows of attention; 0 for global attention in all blocks.
        global_indices: Blocks with global attention all the same.
        rel_pos_bias: Whether every block learns a bias for the relative position of query and key, from zero.
        layer_scale_init_value: What the outputs of attention and FFN are multiplied with at first, learned for each
            channel; 0 for no such factor.
        drop_path_rate: Stochastic depth of the last block; it rises from 0 in the first.
        with_cp: Activation checkpointing: recompute each block in the backward pass to save memory.
        init_cfg: As for every module of MMEngine.

    Raises:
        InputError: ``out_indices`` are not four, or an index is not that of a block.
    """

    def __init__(
        self,
        arch: str | dict = 'base',
        img_size: int = 224,
        patch_size: int = 16,
        out_indices: Sequence[int] = (2, 5, 8, 11),
        window_size: int = 0,
        global_indices: Sequence[int] = (),
        rel_pos_bias: bool = False,
        layer_scale_init_value: float = 0.0,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            arch=arch,
            img_size=img_size,
            patch_size=patch_size,
            out_type='featmap',
            final_norm=False,
            layer_scale_init_value=layer_scale_init_value,
            drop_path_rate=drop_path_rate,
            init_cfg=init_cfg,
        )
        if len(out_indices) != 4:
            raise InputError(f'out_indices={tuple(out_indices)} of DenseViT must name four blocks, one a scale.')
        for name, indices in (('out_indices', out_indices), ('global_indices', global_indices)):
            if not all(0 <= index < self.num_layers for index in indices):
                raise InputError(f'{name}={tuple(indices)} of DenseViT must be within 0 and {self.num_layers - 1}.')
        self.out_indices = tuple(out_indices)
        self.with_cp = with_cp
        for i, layer in enumerate(self.layers):
            size = 0 if i in global_indices else window_size
            attention = WindowAttention(
                self.embed_dims,
                self.arch_settings['num_heads'],
                layer_scale_init_value=layer_scale_init_value,
                window_size=size,
                rel_pos_grid=((size, size) if size else self.patch_resolution) if rel_pos_bias else None,
            )
            attention.out_drop = layer.attn.out_drop  # stochastic depth
            layer.attn = attention
        self.scales = rescaling_layers(self.embed_dims)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps [B, D, s·H, s·W] for s in (4, 2, 1, 1/2) of images on a grid of H x W patches.

        Images [B, 3, *, *] are padded with zeros, below and on the right, to a multiple of the patch size.
        """
        tokens, grid = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + resize_pos_embed(self.pos_embed, self.patch_resolution, grid, self.interpolate_mode)
        maps = {}
        for i, layer in enumerate(self.layers):
            if self.with_cp and torch.is_grad_enabled():
                tokens = checkpoint(run_block, layer, tokens, grid, use_reentrant=False)
            else:
                tokens = run_block(layer, tokens, grid)
            if i in self.out_indices:
                maps[i] = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        return tuple(scale(maps[i]) for scale, i in zip(self.scales, self.out_indices, strict=True))


def rescaling_layers(width: int) -> nn.ModuleList:
    """From maps at the resolution of the patches to maps at 4, 2, 1 and 1/2 times that."""
    enlarge = nn.Sequential(
        nn.ConvTranspose2d(width, width, 2, stride=2),
        LayerNorm2d(width, eps=1e-6),
        nn.GELU(),
        nn.ConvTranspose2d(width, width, 2, stride=2),
    )
    shrink = nn.MaxPool2d(2, ceil_mode=True)  # also a grid of one patch has a half
    return nn.ModuleList([enlarge, nn.ConvTranspose2d(width, width, 2, stride=2), nn.Identity(), shrink])


def run_block(layer: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """One of mmpretrain's encoder layers, with the grid that its attention needs."""
    tokens = tokens + layer.attn(layer.ln1(tokens), grid)
    return layer.ffn(layer.ln2(tokens), identity=tokens)
