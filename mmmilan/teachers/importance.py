"""How important a patch is: attention to it, its likeness to the mean, or its likeness to texts.

The libraries' own attention is watched, not written again: each of its calls of
``F.scaled_dot_product_attention`` brings queries and keys as they are used, normed, turned by rotary positions, and
with the bias of relative positions. Only the one row that is needed is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


class TextImportance(nn.Module):
    """Importance by texts: exp(cos(v, text) / τ) of the nearest text, times the attention if asked for.

    v is the patch's value in the teacher's last attention layer, projected to the joint space of image and text, as in
    MaskCLIP's segmentation (arXiv 2112.01071). The patch's output feature is unsuitable: after the last attention,
    features of CLIP's patches often describe what is beside the patch (arXiv 2304.05653). With several texts, each
    patch is weighted by its nearest text. Importance by texts is an idea of this project; it is in no paper.

    Args:
        embeddings: Of the texts [T, C], of length 1.
        temperature: τ. A lower value favours the patches nearest to a text more strongly; at 1 the draw is nearly
            uniform. CLIP itself is trained at about 0.01.
        with_attention: Multiply by the attention of the teacher's class token (paper, section 2.4).
    """

    def __init__(self, embeddings: Tensor, temperature: float, with_attention: bool) -> None:
        super().__init__()
        self.register_buffer('embeddings', embeddings, persistent=False)
        self.temperature = temperature
        self.with_attention = with_attention

    def forward(self, attention: Tensor, values: Tensor) -> Tensor:
        """Attention [B, N] and projected values [B, N, C] -> importance [B, N], float32, of maximum 1 before the
        attention."""
        with torch.autocast(values.device.type, enabled=False):  # 16 bits are too coarse for a division by τ
            cosine = (F.normalize(values.float(), dim=-1) @ self.embeddings.T).amax(-1)
        weight = ((cosine - cosine.amax(1, keepdim=True)) / self.temperature).exp()
        return weight * attention if self.with_attention else weight


def check_text_options(
    texts: Sequence[str] = (), temperature: float = 0.02, with_attention: bool = False, **unknown: Any
) -> tuple[list[str], float, bool]:
    """The options of ``importance=dict(…)`` of a teacher, with their defaults.

    Raises:
        InputError: there is no text, the temperature is not positive, or an option is unknown.
    """
    if unknown:
        raise InputError(
            f'importance has no option {next(iter(unknown))!r}; it takes texts, temperature and with_attention.'
        )
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"importance.texts={texts!r} is no list of texts; give one, such as ['a crack'].")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise InputError(f'importance.temperature={temperature!r} is out of range; choose more than 0.')
    return list(texts), float(temperature), bool(with_attention)


def class_attention(tokens: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, num_heads: int) -> Tensor:
    """Attention of the class token to each patch, averaged over heads (paper, eq. 3).

    Only the class token's row is formed: its query is carried through the key projection, q·(W_k y) =
    (W_kᵀ q)·y, so no keys are computed. The key bias adds the same to every score and drops out.

    Args:
        tokens: Normed input [B, 1 + N, D] of a self-attention layer, class token first.
        qkv_weight: Packed projection [3D, D].
        qkv_bias: Packed bias [3D], or None.
        num_heads: Number of heads.

    Returns:
        Importance [B, N], float32; with the class token's attention to itself, dropped here, it sums to 1.
    """
    width = tokens.shape[-1]
    head_dim = width // num_heads
    query_bias = None if qkv_bias is None else qkv_bias[:width]
    query = F.linear(tokens[:, 0], qkv_weight[:width], query_bias).unflatten(1, (num_heads, head_dim))
    key_weight = qkv_weight[width : 2 * width].unflatten(0, (num_heads, head_dim))
    query = torch.einsum('bhk,hkd->bhd', query, key_weight.to(query.dtype))
    scores = query @ tokens.to(query.dtype).transpose(1, 2)
    return (scores.float() / math.sqrt(head_dim)).softmax(dim=-1).mean(dim=1)[:, 1:]
