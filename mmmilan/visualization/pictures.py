"""Rows of pictures for a page: what a model sees and predicts, and which images an encoder finds alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmmilan.visualization.figures import draw_heat, draw_mask, last_attention, to_image

SEEN = ['image', 'importance', 'visible', 'loss']
SEEN_EXPLAINED = (
    'From left to right: the image; how important the teacher finds each patch (bright is high); the patches drawn by '
    'importance, which are all that the encoder sees; the loss of each patch (dark is high); and where the class token '
    'looks in the last block of each encoder.'
)


@torch.no_grad()
def seen_and_predicted(milan: nn.Module, backbones: dict[str, nn.Module], images: Tensor) -> list[list[np.ndarray]]:
    """A row for each normalised image [B, 3, H, W]: the columns of ``SEEN``, then the attention of each backbone.

    Without a teacher the importance is left grey.
    """
    attention = [last_attention(backbone, images) for backbone in backbones.values()]
    mean, std = milan.data_preprocessor.mean, milan.data_preprocessor.std
    rows = []
    for i, sample in enumerate(milan.predict(images)):
        image = to_image(images[i], mean, std)
        importance = sample.importance if 'importance' in sample else torch.zeros(len(sample.mask))
        row = [image, draw_heat(image, importance, 'inferno'), draw_mask(image, sample.mask)]
        row += [draw_heat(image, sample.patch_loss, 'Greens')]
        rows.append(row + [draw_heat(image, maps[i], 'inferno') for maps in attention])
    return rows


def nearest_neighbours(features: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Indices [Q, count] of the images most like each query, by the cosine of features [M, D], itself left out."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    similarity = unit[queries] @ unit.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-similarity, axis=1)[:, :count]


Curve = tuple[list[float], list[float]]


def read_scalars(folder: Path) -> list[dict]:
    """What MMEngine's visualizer wrote in a work dir; of steps that were trained again, the later run counts."""
    rows: list[dict] = []
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        run = [json.loads(line) for line in path.read_text().splitlines()]
        if run:
            rows = [row for row in rows if row['step'] < run[0]['step']] + run
    return rows


def loss_curve(folder: Path) -> Curve:
    """Epochs and training losses of a work dir."""
    rows = [row for row in read_scalars(folder) if 'loss' in row and 'epoch' in row]
    if not rows:
        return [], []
    last = rows[-1]
    return [last['epoch'] * row['step'] / last['step'] for row in rows], [row['loss'] for row in rows]


def evaluation_curves(folder: Path) -> dict[str, Curve]:
    """Epochs and scores of ``OnlineEvaluationHook`` in a work dir, by the score's name."""
    rows = [row for row in read_scalars(folder) if 'eval/epoch' in row]
    names = {'eval/knn': 'k-NN, %', 'eval/probe_10': 'probe, 10 % of labels', 'eval/rankme': 'RankMe'}
    names |= {'eval/cosine_patches': 'cosine to the teacher'}
    curves = {}
    for key, name in names.items():
        points = [(row['eval/epoch'], row[key]) for row in rows if key in row]
        if points:
            curves[name] = tuple(map(list, zip(*points, strict=True)))
    return curves
