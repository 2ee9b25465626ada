"""How important a patch is: attention to it, or its likeness to the mean.

The libraries' own attention is watched, not written again: each of its calls of
``F.scaled_dot_product_attention`` brings queries and keys as they are used, normed, turned by rotary positions, and
with the bias of relative positions. Only the one row that is needed is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmmilan.errors import InputError


def name_of(has_class_token: bool, has_pooling_query: bool, layers: int) -> str:
    """What the importance of a model is, in words.

    Raises:
        InputError: it is to be the mean over several blocks, and does not come from the blocks.
    """
    if has_class_token and not has_pooling_query:
        return f'attention of the class token, {"last block" if layers == 1 else f"mean of the last {layers} blocks"}'
    if layers != 1:
        raise InputError(
            f'importance_layers={layers}, but without a class token no block gives importance; leave it out.'
        )
    return 'attention of the pooling query' if has_pooling_query else 'cosine of each token to the mean token'


class WatchAttention(TorchFunctionMode):
    """Keep queries, keys, mask and scale of the last calls of ``F.scaled_dot_product_attention`` in its context.

    Args:
        calls: Where they are kept, oldest first.
        number: How many calls are kept.
    """

    def __init__(self, calls: list[tuple], number: int) -> None:
        super().__init__()
        self.calls, self.number = calls, number

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.keep(*args, **kwargs)
        return func(*args, **kwargs)

    def keep(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        self.calls.append((query[..., :1, :], key, attn_mask, kwargs.get('scale')))
        del self.calls[: -self.number]


def first_row(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Attention of the first query, averaged over heads: s_j = mean_h softmax_j(q_h · k_hj / √d + b_hj).

    Args:
        query: The first query [B, heads, 1, d].
        key: Keys [B, heads, K, d].
        bias: Added to the scores [.., L, K], or None.
        scale: In place of 1 / √d.

    Returns:
        Attention [B, K] to each key, float32; it sums to 1.
    """
    scores = (query @ key.transpose(-2, -1)).float() * (scale or 1 / math.sqrt(query.shape[-1]))
    if bias is not None:
        scores = scores + bias[..., :1, :]
    return scores.softmax(dim=-1).mean(dim=1)[:, 0]


def attention_to_patches(calls: list[tuple], first: int, num_patches: int) -> Tensor:
    """Attention of the first query to each patch, the mean over several layers.

    Args:
        calls: What :class:`WatchAttention` kept.
        first: Index of the first patch among the tokens; class token and registers are left out.
        num_patches: Number N of patches.

    Returns:
        Importance [B, N], float32; it sums to 1 less the attention to the tokens left out.
    """
    rows = [first_row(*call)[:, first : first + num_patches] for call in calls]
    return sum(rows) / len(rows)


def likeness_to_mean(patches: Tensor) -> Tensor:
    """Importance where nothing attends: s_i = max(cos(x_i, x̄), 0) / Σ_j max(cos(x_j, x̄), 0), x̄ the mean token.

    Args:
        patches: Tokens [B, N, D] of the patches.

    Returns:
        Importance [B, N], float32; it sums to 1.
    """
    patches = patches.float()
    cosine = F.cosine_similarity(patches, patches.mean(dim=1, keepdim=True), dim=-1).clamp(min=1e-6)
    return cosine / cosine.sum(dim=1, keepdim=True)
