"""Texts in the joint space of a CLIP, to be compared with features of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextTower(nn.Module):
    """Texts -> embeddings [T, C] of length 1, float32.

    Args:
        encoder: Token ids [T, L], int64 -> embeddings [T, C].
        tokenize: Texts -> token ids [T, L].
        scale: What the CLIP multiplies cosines with before the softmax over texts (its inverse temperature).
    """

    def __init__(self, encoder: nn.Module, tokenize: Callable[[list[str]], Tensor], scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenize = tokenize
        self.scale = scale

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [T, C], on the device of the tower."""
        tokens = self.tokenize(list(texts)).to(next(self.parameters()).device)
        return F.normalize(self.encoder(tokens).float(), dim=-1)
