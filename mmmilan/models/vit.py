"""The encoder: a plain ViT that can be run on its visible patches only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmpretrain.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmilan.checkpoints.loading import exact_initialisation
from mmmilan.checkpoints.positions import sincos_position_embedding
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mmmilan.teachers.importance import class_attention


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, N, C] at index [B, T] -> [B, T, C]; a batch of one serves all rows of the index."""
    batch, channels = len(index), tokens.shape[-1]
    return tokens.expand(batch, -1, -1).gather(1, index.unsqueeze(-1).expand(-1, -1, channels))


def init_linear(module: nn.Module) -> None:
    """MAE's initialisation of linear layers: Xavier uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@MODELS.register_module()
class MILANViT(VisionTransformer):
    """mmpretrain's ``VisionTransformer`` with fixed sine-cosine positions and a masked forward.

    Arguments and state-dict keys are mmpretrain's own, so a checkpoint of one is a checkpoint of the other.

    Args:
        img_size: Side of the images, or (height, width), in pixels.
        with_cp: Activation checkpointing: recompute each block in the backward pass to save memory.
        out_indices: mmpretrain's: the blocks whose outputs are features. With several of them the masked forward
            gives the outputs of these blocks, before the final norm, which is then not trained.

    Attributes:
        patch_resolution: Rows and columns of the grid of patches.
        num_patches: Their number N.
        patch_size: Side of a patch in pixels.

    Raises:
        InputError: ``img_size`` is not a multiple of the patch size.
    """

    def __init__(self, *args, with_cp: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.with_cp = with_cp
        rows, columns = self.patch_resolution
        self.num_patches = rows * columns
        self.patch_size = self.patch_embed.projection.kernel_size[0]
        if self.img_size != (rows * self.patch_size, columns * self.patch_size):
            raise InputError(
                f'img_size={self.img_size} is not a multiple of patch_size={self.patch_size}; '
                f'choose {(rows * self.patch_size, columns * self.patch_size)}.'
            )
        self.pos_embed.requires_grad = False
        if len(self.out_indices) > 1 and self.final_norm:
            self.ln1.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialise as MAE does; weights named by ``init_cfg`` (type 'Pretrained') replace these."""
        for layer in self.layers:
            layer.is_init = True  # keep mmpretrain from re-initialising its blocks
        with exact_initialisation(self):
            super().init_weights()  # first, as it draws positions at random
            self.apply(init_linear)
            projection = self.patch_embed.projection
            nn.init.xavier_uniform_(projection.weight.flatten(1))
            nn.init.zeros_(projection.bias)
            nn.init.normal_(self.cls_token, std=0.02)
            self.pos_embed.data.copy_(sincos_position_embedding(self.patch_resolution, self.embed_dims))

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Encode whole images, or only some of their patches.

        Args:
            images: Normalised images [B, 3, H, W].
            visible: Indices [B, V] of the patches to see, int64; None for all patches.

        Returns:
            With ``visible``, tokens [B, 1 + V, D] after the final norm: class token, then patches in the order given;
            with several ``out_indices``, those of each of these blocks [L, B, 1 + V, D]. Without, mmpretrain's tuple
            of features as ``out_type`` asks.
        """
        if visible is None:
            return super().forward(images)
        x = self.embed_visible(images, visible) + gather_tokens(self.pos_embed[:, 1:], visible)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        layers = []
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.with_cp else layer(x)
            layers.append(x)
        if len(self.out_indices) > 1:
            return torch.stack([layers[i] for i in self.out_indices])
        return self.ln1(x)

    def embed_visible(self, images: Tensor, visible: Tensor) -> Tensor:
        """Patch embedding of the visible patches alone: [B, 3, H, W], [B, V] -> [B, V, D]."""
        if tuple(images.shape[-2:]) != self.img_size:
            raise InputError(
                f'The images are {tuple(images.shape[-2:])} but img_size={self.img_size}; make the '
                'crop of the data pipeline and img_size of the backbone equal.'
            )
        rows, columns = self.patch_resolution
        patches = images.unflatten(2, (rows, -1)).unflatten(4, (columns, -1)).permute(0, 2, 4, 1, 3, 5)
        image = torch.arange(len(images), device=images.device)[:, None]
        patches = patches[image, visible // columns, visible % columns]
        projection = self.patch_embed.projection
        return F.linear(patches.flatten(2), projection.weight.flatten(1), projection.bias)


@contextmanager
def record_attention(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Within this context, each forward pass of a ViT of mmpretrain's kind appends an attention map to a list.

    Yields:
        The list. A map is the attention of the class token to each patch in the last block [B, N], float32, averaged
        over heads.
    """
    attention: list[Tensor] = []
    attn = backbone.layers[-1].attn

    def record(module: nn.Module, args: tuple, output: Tensor) -> None:
        attention.append(class_attention(output, attn.qkv.weight, attn.qkv.bias, attn.num_heads))

    handle = backbone.layers[-1].ln1.register_forward_hook(record)
    try:
        yield attention
    finally:
        handle.remove()


@torch.no_grad()
def last_attention(backbone: MILANViT, images: Tensor) -> Tensor:
    """Attention of the class token in the encoder's last block: normalised images [B, 3, H, W] -> [B, N]."""
    all_patches = torch.arange(backbone.num_patches, device=images.device).expand(len(images), -1)
    with record_attention(backbone) as attention:
        backbone(images, all_patches)
    return attention[0]
