"""The attention of the class token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
