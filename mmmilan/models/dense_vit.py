"""The encoder for detection and segmentation: images of any size in, four feature maps out.

Its attention is global or within windows of a grid of patches, with learned relative positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.logging import print_log
from mmpretrain.models import VisionTransformer
from mmpretrain.models.utils import MultiheadAttention, resize_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmilan.checkpoints.loading import exact_initialisation
from mmmilan.checkpoints.positions import sincos_position_embedding
from mmmilan.errors import InputError
from mmmilan.registry import MODELS


@MODELS.register_module()
class DenseViT(VisionTransformer):
    """mmpretrain's ``VisionTransformer`` for dense prediction.

    With the arguments of this project's configs it is the encoder of hustvl/MIMDet's "benchmarking" Mask R-CNN (its
    reproduction of Li et al., arXiv 2111.11429) or of implus/mae_segmentation's UperNet. Its keys are those of
    ``MILANViT`` and mmpretrain's ViT, so their checkpoints load as they are, with
    ``init_cfg=dict(type='Pretrained', checkpoint=...)``. Relative positions, layer scale and the layers that rescale
    the maps are not in them and start anew.

    Args:
        arch: As in mmpretrain.
        img_size: Size in pixels that the absolute positions, and the relative ones of global blocks, are stored for;
            for other sizes they are interpolated.
        patch_size: Side of a patch in pixels.
        out_indices: The four blocks, from 0, whose outputs become the maps at 4, 2, 1 and 1/2 times the
            resolution of the patches.
        with_cls_token: Keep the class token.
        sincos_pos_embed: Start from sine-cosine positions of ``img_size`` instead of the checkpoint's; both are
            trained. Their first half encodes the row, as in MIMDet; in MAE and MILAN it encodes the column.
        window_size: Side in patches of the windows of attention; 0 for global attention in all blocks.
        global_indices: Blocks that keep global attention when ``window_size`` is set.
        rel_pos_bias: Learned bias, from zero, for the relative position of query and key: ``True`` for one in every
            block, ``'shared'`` for two, one of all windowed blocks and one of all global blocks.
        layer_scale_init_value: Initial layer scale, a learned factor of each channel of what attention and FFN give;
            0 for none.
        scale_norm_cfg: The norm within the layers that make the largest map.
        drop_path_rate: Stochastic depth of the last block; it rises from 0 in the first.
        frozen_stages: The first blocks that are not trained, and with them the patch embedding, the class token and the
            positions; -1 or 0 for none, as in mmpretrain. A table of relative positions that blocks share is trained
            as long as one of them is.
        with_cp: Activation checkpointing: recompute each block in the backward pass to save memory.
        init_cfg: As for every module of MMEngine.

    Raises:
        InputError: ``out_indices`` are not four, an index is not that of a block, or arguments do not go together.
    """

    OUT_TYPES = {'featmap'}  # no tokens

    def __init__(
        self,
        arch: str | dict = 'base',
        img_size: int = 224,
        patch_size: int = 16,
        out_indices: Sequence[int] = (2, 5, 8, 11),
        with_cls_token: bool = True,
        sincos_pos_embed: bool = False,
        window_size: int = 0,
        global_indices: Sequence[int] = (),
        rel_pos_bias: bool | str = False,
        layer_scale_init_value: float = 0.0,
        scale_norm_cfg: dict | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            arch=arch,
            img_size=img_size,
            patch_size=patch_size,
            out_type='featmap',
            with_cls_token=with_cls_token,
            final_norm=False,
            layer_scale_init_value=layer_scale_init_value,
            drop_path_rate=drop_path_rate,
            init_cfg=init_cfg,
        )
        self.out_indices = tuple(out_indices)
        self.sincos_pos_embed = sincos_pos_embed
        self.with_cp = with_cp
        self._check(global_indices, rel_pos_bias, frozen_stages)
        self.rel_pos_shared = nn.ParameterDict()
        for i, layer in enumerate(self.layers):
            size = 0 if i in global_indices else window_size
            grid = (size, size) if size else self.patch_resolution
            attention = WindowAttention(
                self.embed_dims,
                self.arch_settings['num_heads'],
                layer_scale_init_value=layer_scale_init_value,
                window_size=size,
                rel_pos_grid=grid if rel_pos_bias is True else None,
                with_cls_token=with_cls_token,
            )
            attention.out_drop = layer.attn.out_drop  # stochastic depth
            layer.attn = attention
            if rel_pos_bias == 'shared' and share_of(attention) not in self.rel_pos_shared:
                shape = (attention.num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1)
                self.rel_pos_shared[share_of(attention)] = nn.Parameter(torch.zeros(shape))
        self.scales = rescaling_layers(self.embed_dims, scale_norm_cfg or dict(type='mmpretrain.LN2d', eps=1e-6))
        self.frozen_stages = frozen_stages
        if frozen_stages > 0:  # here, as the attention that mmpretrain would freeze has been replaced
            self._freeze_stages()
            trained = {share_of(layer.attn) for layer in self.layers[frozen_stages:]}
            for kind, table in self.rel_pos_shared.items():
                table.requires_grad_(kind in trained)

    def train(self, mode: bool = True) -> DenseViT:
        """Set the mode; frozen blocks have no stochastic depth."""
        super().train(mode)
        for layer in self.layers[: max(self.frozen_stages, 0)]:
            layer.eval()
        return self

    def init_weights(self) -> None:
        """Load the weights that ``init_cfg`` names; ``sincos_pos_embed`` replaces their positions."""
        with exact_initialisation(self):
            super().init_weights()
        if self.sincos_pos_embed:
            rows, columns = self.patch_resolution
            # for the rows in the first half of the channels, positions of the transposed grid
            positions = sincos_position_embedding((columns, rows), self.embed_dims)
            grid = positions[:, 1:].unflatten(1, (columns, rows)).transpose(1, 2).flatten(1, 2)
            self.pos_embed.data.copy_(torch.cat([positions[:, : self.num_extra_tokens], grid], dim=1))
            print_log(f'Positions start as sines and cosines of the {rows}x{columns} grid.', logger='current')

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps [B, D, s·H, s·W] for s in (4, 2, 1, 1/2) of images on a grid of H x W patches.

        Images [B, 3, *, *] are padded with zeros, below and on the right, to a multiple of the patch size.
        """
        tokens, grid = self.patch_embed(images)
        if self.with_cls_token:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + resize_pos_embed(
            self.pos_embed, self.patch_resolution, grid, self.interpolate_mode, self.num_extra_tokens
        )
        maps = {}
        for i, layer in enumerate(self.layers):
            arguments = (layer, tokens, grid, self.rel_pos_shared.get(share_of(layer.attn)))
            if self.with_cp and torch.is_grad_enabled():
                tokens = checkpoint(run_block, *arguments, use_reentrant=False)
            else:
                tokens = run_block(*arguments)
            if i in self.out_indices:
                # contiguous, as mmcv's RoIAlign misreads maps in channels-last memory, and convolutions keep the format
                maps[i] = tokens[:, self.num_extra_tokens :].transpose(1, 2).unflatten(2, grid).contiguous()
        return tuple(scale(maps[i]) for scale, i in zip(self.scales, self.out_indices, strict=True))

    def _check(self, global_indices: Sequence[int], rel_pos_bias: bool | str, frozen_stages: int) -> None:
        if len(self.out_indices) != 4:
            raise InputError(f'out_indices={self.out_indices} of DenseViT are not four; name a block for each scale.')
        for name, indices in (('out_indices', self.out_indices), ('global_indices', global_indices)):
            if not all(0 <= index < self.num_layers for index in indices):
                last = self.num_layers - 1
                raise InputError(f'{name}={tuple(indices)} of DenseViT is out of range; choose from 0 to {last}.')
        if isinstance(frozen_stages, bool) or frozen_stages not in range(-1, self.num_layers + 1):
            raise InputError(
                f'frozen_stages={frozen_stages} of DenseViT is out of range; choose from -1 to {self.num_layers}.'
            )
        if rel_pos_bias not in (True, False, 'shared'):
            raise InputError(f"rel_pos_bias={rel_pos_bias!r} of DenseViT is unknown; choose True, False or 'shared'.")
        if rel_pos_bias == 'shared' and self.with_cls_token:
            raise InputError("rel_pos_bias='shared' has no place for the class token; set with_cls_token=False.")

    def _prepare_pos_embed(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        """mmpretrain's resizing of positions; without a class token its position is left out at any size."""
        name = prefix + 'pos_embed'
        if name in state_dict and not self.with_cls_token:
            patches = state_dict[name].shape[1] - 1
            if patches and math.isqrt(patches) ** 2 == patches:  # a square of patches, and the class token
                state_dict[name] = state_dict[name][:, 1:]
        super()._prepare_pos_embed(state_dict, prefix, *args, **kwargs)


def share_of(attention: WindowAttention) -> str:
    """Which of the two shared relative position biases a block takes."""
    return 'windows' if attention.window_size else 'global'


def rescaling_layers(width: int, norm_cfg: dict) -> nn.ModuleList:
    """From maps at the resolution of the patches to maps at 4, 2, 1 and 1/2 times that."""
    enlarge = nn.Sequential(
        nn.ConvTranspose2d(width, width, 2, stride=2),
        build_norm_layer(norm_cfg, width)[1],
        nn.GELU(),
        nn.ConvTranspose2d(width, width, 2, stride=2),
    )
    shrink = nn.MaxPool2d(2, ceil_mode=True)  # also a grid of one patch has a half
    return nn.ModuleList([enlarge, nn.ConvTranspose2d(width, width, 2, stride=2), nn.Identity(), shrink])


def run_block(layer: nn.Module, tokens: Tensor, grid: tuple[int, int], shared_table: Tensor | None) -> Tensor:
    """One of mmpretrain's encoder layers, with the grid that its attention needs."""
    tokens = tokens + layer.attn(layer.ln1(tokens), grid, shared_table)
    return layer.ffn(layer.ln2(tokens), identity=tokens)


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
