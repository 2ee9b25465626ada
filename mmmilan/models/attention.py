"""The attention of the class token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmmilan.models.vit import MILANViT


def class_attention(tokens: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, num_heads: int) -> Tensor:
    """Attention of the class token to each patch, averaged over heads (paper, eq. 3).

    Only the class token's row is formed: its query is carried through the key projection, q·(W_k y) =
    (W_kᵀ q)·y, so no keys are computed. The key bias adds the same to every score and drops out.

    Args:
        tokens: Normed input [B, 1 + N, D] of a self-attention layer, class token first.
        qkv_weight: Packed projection [3D, D].
        qkv_bias: Packed bias [3D].
        num_heads: Number of heads.

    Returns:
        Importance [B, N], float32; with the class token's attention to itself, dropped here, it sums to 1.
    """
    width = tokens.shape[-1]
    head_dim = width // num_heads
    query = F.linear(tokens[:, 0], qkv_weight[:width], qkv_bias[:width]).unflatten(1, (num_heads, head_dim))
    key_weight = qkv_weight[width : 2 * width].unflatten(0, (num_heads, head_dim))
    query = torch.einsum('bhk,hkd->bhd', query, key_weight.to(query.dtype))
    scores = query @ tokens.to(query.dtype).transpose(1, 2)
    return (scores.float() / math.sqrt(head_dim)).softmax(dim=-1).mean(dim=1)[:, 1:]


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
