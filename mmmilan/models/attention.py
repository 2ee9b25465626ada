"""The attention of the class token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmmilan.teachers.importance import class_attention

if TYPE_CHECKING:
    from mmmilan.models.vit import MILANViT


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
