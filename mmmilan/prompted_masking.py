"""Words decide which patches the encoder sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.masking import SemanticAwareMasking
from mmmilan.registry import TRANSFORMS

if TYPE_CHECKING:
    from mmmilan.models.teachers import Teacher


@TRANSFORMS.register_module()
class PromptedMasking(SemanticAwareMasking):
    """Keep patches with probability proportional to exp(cos(t, text) / τ), times the attention if asked for.

    t is the teacher's feature of a patch in the joint space of image and text; of several texts, the nearest to the
    patch counts. This is this project's own: no paper has it. The draw is that of :class:`SemanticAwareMasking`.

    It does what the words ask for only with a teacher whose patches say what is on them. Those of a CLIP may say it of
    what is around them (arXiv 2304.05653): look at ``mmmilan heat-maps`` first.

    Args:
        texts: What is to stay visible, such as 'a crack'.
        temperature: τ. The lower, the surer are the patches nearest to a text; at 1 the draw is nearly uniform. A CLIP
            is itself trained at about 0.01.
        with_attention: Multiply by the attention of the teacher's class token (paper, section 2.4).
        mask_ratio: As for every masking.
        rounding: As for every masking.

    Raises:
        InputError: there is no text, the temperature is not positive, or the teacher has no text tower.
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
        """Embed the texts with the teacher's text tower, once."""
        if teacher is None:
            raise InputError('PromptedMasking needs a teacher with a text tower; give the head an OpenCLIPTeacher.')
        self.embeddings = teacher.text_tower()(self.texts)  # [T, C]

    def weigh(self, importance: Tensor, features: Tensor) -> Tensor:
        """exp(cos(t, text) / τ) of the nearest text [B, N], float32, 1 for the greatest of an image."""
        if not isinstance(features, Tensor) or features.shape[-1] != self.embeddings.shape[1]:
            raise InputError("PromptedMasking compares texts with one teacher's features; set head.type to CLIPTarget.")
        self.embeddings = self.embeddings.to(features.device)
        cosine = (F.normalize(features[:, 1:].float(), dim=-1) @ self.embeddings.T).amax(-1)
        weight = ((cosine - cosine.amax(1, keepdim=True)) / self.temperature).exp()
        return weight * importance if self.with_attention else weight

    def transform(self, results: dict) -> dict:
        """Refused: a data pipeline has no features to compare with the texts."""
        raise InputError('PromptedMasking is no step of a data pipeline; give it to the model as masking.')
