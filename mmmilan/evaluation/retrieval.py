"""Retrieval between images and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.registry import METRICS

CHUNK = 1024  # rows of a matrix of similarities that are held at a time


@METRICS.register_module()
class RetrievalRecall(BaseMetric):
    """Recall at k, in percent, of texts by images and of images by texts, over the whole test set.

    An image counts as right if one of its texts is among the k best. Each text is a query of its own. A tie counts as
    a failure. The model gives each data sample ``image_embedding`` [E] and ``text_embedding`` [T, E], of length 1.

    Args:
        topk: The values of k.
        collect_device: As for MMEngine's ``BaseMetric``.
    """

    default_prefix = 'retrieval'

    def __init__(self, topk: Sequence[int] = (1, 5, 10), collect_device: str = 'cpu') -> None:
        super().__init__(collect_device)
        self.topk = topk

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            if 'text_embedding' not in sample:
                raise InputError(
                    f'{sample.get("img_path", "A test image")} has no text; add TokenizeCaption with '
                    "all_captions=True and PackInputs with algorithm_keys=('text',) to the test pipeline."
                )
            self.results.append((sample['image_embedding'].float().cpu(), sample['text_embedding'].float().cpu()))

    def compute_metrics(self, results: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        images, texts = torch.stack([image for image, _ in results]), torch.cat([text for _, text in results])
        owner = torch.repeat_interleave(torch.tensor([len(text) for _, text in results]))
        ranks = dict(text=text_rank(images, texts, owner), image=image_rank(images, texts, owner))
        return {
            f'{name}_recall@{k}': 100 * float((rank < k).float().mean())
            for name, rank in ranks.items()
            for k in self.topk
        }


def text_rank(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """How many other texts are at least as close to an image as its own closest text.

    Args:
        images: Embeddings [I, E].
        texts: Embeddings [T, E].
        owner: The image [T] of each text, int64.

    Returns:
        Numbers [I]; what cannot be compared (NaN) counts as closer.
    """
    ranks = []
    for start in range(0, len(images), CHUNK):
        similarity = images[start : start + CHUNK] @ texts.T
        own = owner == torch.arange(start, start + len(similarity))[:, None]
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~own & ~(similarity < best)).sum(1))
    return torch.cat(ranks)


def image_rank(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """How many other images are at least as close to a text as its own: [T]. Arguments of :func:`text_rank`."""
    ranks = []
    for start in range(0, len(texts), CHUNK):
        similarity = texts[start : start + CHUNK] @ images.T
        own = similarity.gather(1, owner[start : start + CHUNK, None])
        ranks.append((~(similarity < own)).sum(1) - 1)
    return torch.cat(ranks)
