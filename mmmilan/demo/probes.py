"""Probes of the demo's frozen encoders."""

from __future__ import annotations

import argparse

from mmengine.config import Config
from mmengine.registry import DATASETS
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmmilan.datasets.sources import class_folders
from mmmilan.evaluation.probes import extract_features, knn_accuracy, linear_probe_accuracy

PROBES = ('linear probe', 'with 10 % of the labels', 'k-NN')


class TeacherEncoder(nn.Module):
    """The teacher of a MILAN as an encoder, with its class token as the feature."""

    def __init__(self, milan: nn.Module) -> None:
        super().__init__()
        self.data_preprocessor, self.head = milan.data_preprocessor, milan.head

    def extract_feat(self, images: Tensor) -> tuple[Tensor]:
        """Normalised images [B, 3, H, W] -> features [B, C]."""
        return (self.head.run_teacher(images)[0][:, 0],)


def probing_datasets(cfg: Config, args: argparse.Namespace) -> list[Dataset]:
    """Labelled data: train and test set, or a single data set to split; [] if folders do not name classes."""
    if args.data and not class_folders(args.data):
        return []
    folders = [args.data] if args.data else [args.out / 'scenes' / split for split in ('train', 'val')]
    dataset = cfg.test_dataloader.dataset
    return [DATASETS.build({**dataset, 'data_root': str(folder), 'with_label': True}) for folder in folders]


def probe(name: str, model: nn.Module, datasets: list[Dataset]) -> dict[str, float]:
    """Top-1 accuracy in percent of each of ``PROBES`` on the model's frozen class token."""
    parts = [extract_features(model, dataset, f'Features of {name}') for dataset in datasets]
    if len(parts) == 1:
        features, labels = parts[0]
        split = train_test_split(features, labels, test_size=0.2, random_state=0)
        parts = [(split[0], split[2]), (split[1], split[3])]
    (features, labels), test = parts
    accuracies = (
        linear_probe_accuracy((features, labels), test),
        linear_probe_accuracy((features[::10], labels[::10]), test),
        knn_accuracy((features, labels), test),
    )
    return {probe: 100 * accuracy for probe, accuracy in zip(PROBES, accuracies, strict=True)}
