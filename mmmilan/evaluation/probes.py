"""Quick measures of frozen features: k-NN and a linear probe by scikit-learn, in seconds."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import FUNCTIONS
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmmilan.evaluation.knn import vote


@torch.no_grad()
def extract_features(model: nn.Module, dataset: Dataset, description: str) -> tuple[np.ndarray, np.ndarray]:
    """Features of every image of a labelled data set: what ``model.extract_feat`` gives, by default class tokens.

    Args:
        model: A model with a data preprocessor, such as ``MILAN``, in evaluation mode.
        dataset: Packs ``inputs`` and labelled ``data_samples``.
        description: What the progress bar says.

    Returns:
        Features [M, D], float32, and labels [M], int64.
    """
    loader = DataLoader(dataset, batch_size=128, collate_fn=FUNCTIONS.get('default_collate'))
    batches, labels = [], []
    for batch in track(loader, description, transient=True):
        batches.append(model.extract_feat(model.data_preprocessor(batch)['inputs'])[-1].float().cpu())
        labels.extend(int(sample.gt_label) for sample in batch['data_samples'])
    return torch.cat(batches).numpy(), np.array(labels)


Split = tuple[np.ndarray, np.ndarray]


def knn_predictions(train: Split, features: np.ndarray, k: int = 20, temperature: float = 0.07) -> np.ndarray:
    """Classes [T] by the vote of the nearest neighbours, see :func:`mmmilan.evaluation.knn.vote`."""
    bank, queries = (F.normalize(torch.from_numpy(rows), dim=1) for rows in (train[0], features))
    labels = torch.from_numpy(train[1])
    return vote(queries, bank, labels, int(labels.max()) + 1, k, temperature).argmax(1).numpy()


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
