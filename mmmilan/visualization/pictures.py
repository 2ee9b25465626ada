"""What pages show of a model: what it sees and predicts, nearest neighbours, and curves of its training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmmilan.models.attention import last_attention
from mmmilan.visualization.figures import draw_heat, draw_masked, to_images
from mmmilan.visualization.page import Page


def add_predictions(
    page: Page, milan: nn.Module, backbones: dict[str, nn.Module], images: Tensor, names: list[str]
) -> None:
    """Add a section on what a model sees and predicts.

    Args:
        page: The page.
        milan: The model, in evaluation mode.
        backbones: Name -> encoder whose attention is shown.
        images: Normalised images [B, 3, H, W].
        names: What each image shows.
    """
    page.heading(
        'What MILAN sees and predicts',
        'From left to right: the image; the importance that the teacher gives each patch (bright is high); the patches '
        'drawn by importance, which are all that the encoder sees; the loss of each patch (dark is high); and the '
        'attention of the class token in the last block of each encoder.',
    )
    header = ['image', 'importance', 'visible', 'loss', *(f'attention: {name}' for name in backbones)]
    page.gallery(header, draw_predictions(milan, backbones, images), names)


@torch.no_grad()
def draw_predictions(milan: nn.Module, backbones: dict[str, nn.Module], images: Tensor) -> list[list[np.ndarray]]:
    """For each normalised image [B, 3, H, W]: image, importance, mask, loss, and the attention of each backbone.

    Without a teacher the importance is left grey.
    """
    attention = [last_attention(backbone, images) for backbone in backbones.values()]
    originals = to_images(images, milan.data_preprocessor)
    rows = []
    for i, (image, sample) in enumerate(zip(originals, milan.predict(images), strict=True)):
        importance = sample.importance if 'importance' in sample else torch.zeros(len(sample.mask))
        row = [image, draw_heat(image, importance, 'inferno'), draw_masked(image, sample.mask)]
        row += [draw_heat(image, sample.patch_loss, 'Greens')]
        rows.append(row + [draw_heat(image, maps[i], 'inferno') for maps in attention])
    return rows


def evenly_spaced(size: int, count: int) -> list[int]:
    """Up to ``count`` evenly spaced indices below ``size``, the first and the last included."""
    return np.linspace(0, size - 1, min(size, count)).astype(int).tolist()


def nearest_neighbours(features: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Indices [Q, count] of the images nearest to each query by the cosine of features [M, D], without the query."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    similarity = unit[queries] @ unit.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-similarity, axis=1)[:, :count]


Curve = tuple[list[float], list[float]]


def read_scalars(folder: Path) -> list[dict]:
    """Read the log of MMEngine's visualizer in a work dir; for steps that several runs trained, the last run counts."""
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
    """Epochs and scores of ``OnlineEvaluationHook`` in a work dir, by the name of the score."""
    rows = [row for row in read_scalars(folder) if 'eval/epoch' in row]
    names = {'eval/knn': 'k-NN, %', 'eval/probe_10': 'probe, 10 % of labels', 'eval/rankme': 'RankMe'}
    names |= {'eval/cosine_patches': 'cosine to the teacher'}
    curves = {}
    for key, name in names.items():
        points = [(row['eval/epoch'], row[key]) for row in rows if key in row]
        if points:
            curves[name] = tuple(map(list, zip(*points, strict=True)))
    return curves
