"""Quick measures of frozen features: k-NN and a linear probe by scikit-learn, in seconds; and those without labels."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmmilan.models.milan import MILAN

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO, arXiv 2104.14294
Split = tuple[np.ndarray, np.ndarray]  # features [M, D] and classes [M]


def vote(queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Share of each class in the votes of the k nearest neighbours, weighted by exp(similarity / temperature).

    Args:
        queries: Features [B, D] of length 1.
        bank: Features [M, D] of length 1 of labelled images.
        labels: Their classes [M], int64.
        num_classes: Number C of classes.
        k: Number of neighbours; all of them if the bank has fewer.
        temperature: Lower values give the nearest neighbours more weight.

    Returns:
        Shares [B, C]; each row sums to 1.
    """
    similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    weights = (similarity / temperature).softmax(dim=1)
    return weights.new_zeros(len(queries), num_classes).scatter_add_(1, labels[nearest], weights)


def knn_predictions(train: Split, features: np.ndarray) -> np.ndarray:
    """Classes [T] by the :func:`vote` of the nearest neighbours."""
    bank, queries = (F.normalize(torch.from_numpy(rows), dim=1) for rows in (train[0], features))
    labels = torch.from_numpy(train[1])
    return vote(queries, bank, labels, int(labels.max()) + 1, NEIGHBOURS, TEMPERATURE).argmax(1).numpy()


def linear_probe_predictions(train: Split, features: np.ndarray) -> np.ndarray:
    """Classes [T] by logistic regression on standardised features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return classifier.fit(*train).predict(features)


def knn_accuracy(train: Split, test: Split) -> float:
    """Top-1 accuracy in [0, 1] of the vote of the nearest neighbours."""
    return float((knn_predictions(train, test[0]) == test[1]).mean())


def linear_probe_accuracy(train: Split, test: Split) -> float:
    """Top-1 accuracy in [0, 1] of logistic regression on standardised features."""
    return float((linear_probe_predictions(train, test[0]) == test[1]).mean())


def rankme(features: np.ndarray) -> float:
    """RankMe, the effective rank of features (arXiv 2210.02885, equation 1).

    exp of the entropy of the singular values over their sum: 1 if all features are multiples of one, D if all
    directions are used alike. It cannot exceed the number of images, so compare it on the same images only.

    Args:
        features: [M, D], not centred.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def cosines_to_teacher(model: MILAN, images: Tensor) -> dict[str, Tensor]:
    """How close the predictions of whole images are to the teacher's features; for a model with a joint space.

    Args:
        model: With a teacher of features as its target.
        images: Normalised images [B, 3, H, W], of which nothing is masked.

    Returns:
        The cosine of class tokens and the mean cosine of patches [B], as ``cosine_class`` and ``cosine_patches``.
    """
    features, _ = model.head.run_teacher(images)
    cosine = torch.cosine_similarity(model.embed_joint(images), features.float(), dim=-1)
    return dict(cosine_class=cosine[:, 0], cosine_patches=cosine[:, 1:].mean(1))
