"""How good are frozen features? k-NN and a linear probe with scikit-learn: seconds, where LARS takes a day."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.registry import FUNCTIONS
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@torch.no_grad()
def extract_features(
    features: Callable[[Tensor], Tensor], preprocessor: nn.Module, dataset: Dataset, description: str
) -> tuple[np.ndarray, np.ndarray]:
    """Features of every image of a data set that packs ``inputs`` and labelled ``data_samples``.

    Args:
        features: Normalised images [B, 3, H, W] -> features [B, D].
        preprocessor: The model's data preprocessor.
        dataset: The data set.
        description: What the progress bar says.

    Returns:
        Features [M, D], float32, and labels [M], int64.
    """
    loader = DataLoader(dataset, batch_size=128, collate_fn=FUNCTIONS.get('default_collate'))
    device = get_device()
    batches, labels = [], []
    for batch in track(loader, description, transient=True):
        inputs = preprocessor.to(device)(batch)['inputs']
        batches.append(features(inputs).float().cpu())
        labels.extend(int(sample.gt_label) for sample in batch['data_samples'])
    return torch.cat(batches).numpy(), np.array(labels)


def mean_patch(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """Mean of the patch tokens after the final norm of a ``MILANViT``, as fine-tuning uses them."""
    backbone.to(get_device())
    backbone.eval()  # in a line of its own: mmpretrain's train() returns None
    every_patch = torch.arange(backbone.num_patches, device=get_device())
    return lambda images: backbone(images, every_patch.expand(len(images), -1))[:, 1:].mean(dim=1)


Split = tuple[np.ndarray, np.ndarray]


def knn_accuracy(train: Split, test: Split, neighbours: int = 20) -> float:
    """Top-1 accuracy in [0, 1] of the vote of the nearest ``neighbours`` by cosine, weighted by closeness."""
    classifier = KNeighborsClassifier(neighbours, metric='cosine', weights='distance')
    return float(classifier.fit(*train).score(*test))


def linear_probe_accuracy(train: Split, test: Split) -> float:
    """Top-1 accuracy in [0, 1] of logistic regression on standardised features."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    return float(classifier.fit(*train).score(*test))
