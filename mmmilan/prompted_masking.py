"""Masking by text: the encoder sees the patches that match given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.models.masking import SemanticAwareMasking
from mmmilan.registry import TRANSFORMS

if TYPE_CHECKING:
    from mmmilan.models.teachers import Teacher


@TRANSFORMS.register_module()
class PromptedMasking(SemanticAwareMasking):
    """Keep patches with probability proportional to exp(cos(v, text) / τ), times the attention if asked for.

    v is the patch's value in the teacher's last attention layer, projected to the joint space of image and text, as in
    MaskCLIP's segmentation (arXiv 2112.01071). The patch's output feature is unsuitable: after the last attention,
    features of CLIP's patches often describe what is beside the patch (arXiv 2304.05653). With several texts, each
    patch is weighted by its nearest text. The draw is that of :class:`SemanticAwareMasking`. Masking by text is an
    idea of this project; it is in no paper.

    Args:
        texts: What should stay visible, such as 'a crack'.
        temperature: τ. A lower value favours the patches nearest to a text more strongly; at 1 the draw is nearly
            uniform. CLIP itself is trained at about 0.01.
        with_attention: Multiply by the attention of the teacher's class token (paper, section 2.4).
        mask_ratio: See :class:`Masking`.
        rounding: See :class:`Masking`.

    Raises:
        InputError: there is no text, the temperature is not positive, or the teacher has no text tower or does not give
            the values of its patches.
    """

    def __init__(
        self,
        texts: Sequence[str],
        temperature: float = 0.02,
        with_attention: bool = False,
        mask_ratio: float = 0.75,
        rounding: str = 'floor',
    ) -> None:
        super().__init__(mask_ratio, rounding)
        if isinstance(texts, str) or not texts:
            raise InputError(f"masking.texts={texts!r} is no list of texts; give one, such as ['a crack'].")
        if temperature <= 0:
            raise InputError(f'masking.temperature={temperature} is out of range; choose more than 0.')
        self.texts = list(texts)
        self.temperature = temperature
        self.with_attention = with_attention

    def prepare(self, teacher: Teacher | None) -> None:
        """Embed the texts with the teacher's text tower, once, and make the teacher weigh its importance by them.

        Raises:
            InputError: there is no teacher, or it lacks a text tower or the values of its patches.
        """
        if teacher is None:
            raise InputError('PromptedMasking needs a teacher with a text tower; give the head an OpenCLIPTeacher.')
        self.embeddings = teacher.text_tower()(self.texts)  # [T, C]
        teacher.weigh_by(self.weigh)

    def weigh(self, attention: Tensor, values: Tensor) -> Tensor:
        """Weights exp(cos(v, text) / τ) of the nearest text, scaled to a maximum of 1 per image.

        Args:
            attention: Attention of the class token to each patch [B, N].
            values: Projected values of the patches [B, N, C].

        Returns:
            Weights [B, N], float32, multiplied by ``attention`` if ``with_attention``.
        """
        self.embeddings = self.embeddings.to(values.device)
        with torch.autocast(values.device.type, enabled=False):  # 16 bits are too coarse for a division by τ
            cosine = (F.normalize(values.float(), dim=-1) @ self.embeddings.T).amax(-1)
        weight = ((cosine - cosine.amax(1, keepdim=True)) / self.temperature).exp()
        return weight * attention if self.with_attention else weight

    def transform(self, results: dict) -> dict:
        """Always raises an :class:`InputError`: a data pipeline has no features to compare with the texts."""
        raise InputError('PromptedMasking does not work in a data pipeline; give it to the model as masking.')
