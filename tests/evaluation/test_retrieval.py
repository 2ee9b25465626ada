"""Recall of retrieval against sorting."""

from __future__ import annotations

import pytest
import torch
from mmengine.evaluator import Evaluator
from torch import Tensor
from torch.nn.functional import normalize

from helpers import slow_recall
from mmmilan.errors import InputError
from mmmilan.evaluation import RetrievalRecall


def recall_of(images: Tensor, texts: list[Tensor]) -> dict[str, float]:
    metric = Evaluator(RetrievalRecall())
    samples = [dict(image_embedding=i, text_embedding=t) for i, t in zip(images, texts, strict=True)]
    for start in range(0, len(samples), 7):
        metric.metrics[0].process({}, samples[start : start + 7])
    return metric.evaluate(len(samples))


def test_recall_of_random_embeddings(monkeypatch):
    """Images with one to three texts each; similarities are computed in several chunks."""
    monkeypatch.setattr('mmmilan.evaluation.retrieval.CHUNK', 8)
    images = normalize(torch.randn(30, 6), dim=1)
    texts = [normalize(image + torch.randn(1 + i % 3, 6), dim=1) for i, image in enumerate(images)]
    owners = [i for i, own in enumerate(texts) for _ in own]
    expected = slow_recall(images, torch.cat(texts), owners)
    assert recall_of(images, texts) == {f'retrieval/{k}': pytest.approx(v) for k, v in expected.items()}
    assert 0 < expected['image_recall@1'] < expected['image_recall@10'] < 100


@pytest.mark.parametrize('value', [1.0, torch.nan])
def test_collapsed_embeddings_find_nothing(value):
    images = torch.full((30, 4), value)
    assert set(recall_of(images, [row[None] for row in images]).values()) == {0.0}


def test_retrieval_needs_texts():
    with pytest.raises(InputError, match='a.png has no text; add TokenizeCaption'):
        RetrievalRecall().process({}, [dict(img_path='a.png', image_embedding=torch.ones(2))])
