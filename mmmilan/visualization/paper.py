"""Figures 2 to 5 of the paper, for any models and images. The same inputs and seed give the same files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from mmmilan.files import atomic_write

DPI = 150
WIDTH, TITLE = 1.5, 0.25  # inches: width of an image, height of the titles


# names of models and classes, and texts of users, may hold $, which is no formula
plain_text = matplotlib.rc_context({'text.parse_math': False})


@plain_text
def draw_tsne(features: dict[str, np.ndarray], labels: np.ndarray, classes: Sequence[str], seed: int = 0) -> Figure:
    """Features in two dimensions by t-SNE, one panel per model, with the silhouette of the classes (paper, figure 2).

    The silhouette score (Rousseeuw, 1987) is computed from the features, with cosine distance, not from the
    two-dimensional points: 1 if each class is a cluster of its own, 0 if classes overlap.

    Args:
        features: Name of the model -> features [M, D].
        labels: Class of each image [M], an index into ``classes``.
        classes: Names of the classes, two or more.
        seed: Seed of t-SNE.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    figure = Figure(figsize=(3.2 * len(features), 3.8), layout='constrained')
    colours = np.array([hsv_to_rgb((i / len(classes), 0.85, 0.55 + 0.4 * (i % 2))) for i in range(len(classes))])
    for axes, (name, values) in zip(figure.subplots(1, len(features), squeeze=False)[0], features.items(), strict=True):
        values = values / np.linalg.norm(values, axis=1, keepdims=True)
        perplexity = min(30.0, (len(values) - 1) / 3)
        points = TSNE(init='pca', perplexity=perplexity, random_state=seed).fit_transform(values)
        axes.scatter(*points.T, c=colours[labels], s=6, linewidths=0)
        axes.set(title=name, xticks=[], yticks=[], box_aspect=1)
        if len(classes) < len(values):  # with one image a class there are no clusters
            axes.set_xlabel(f'silhouette {silhouette_score(values, labels, metric="cosine"):.3f}')
    handles = [axes.scatter([], [], color=colour, s=16) for colour in colours]
    style = dict(ncols=max(2, 2 * len(features)), fontsize=6, frameon=False)
    figure.legend(handles, classes, loc='outside lower center', **style)
    return figure


@plain_text
def draw_pictures(columns: dict[str, Sequence[np.ndarray]]) -> Figure:
    """A grid of images: one row per image, one column per view of it (paper, figures 3 to 5).

    Args:
        columns: Title -> RGB uint8 images [H, W, 3], as many in each column.
    """
    gap = 4
    tiles = [
        [np.pad(image, ((0, gap), (0, gap), (0, 0)), constant_values=255) for image in c] for c in columns.values()
    ]
    canvas = np.concatenate([np.concatenate(column) for column in tiles], axis=1)
    height, width = canvas.shape[0] / tiles[0][0].shape[1], len(tiles)  # in widths of an image
    figure = Figure(figsize=(WIDTH * width, WIDTH * height + TITLE))
    axes = figure.add_axes((0, 0, 1, WIDTH * height / (WIDTH * height + TITLE)))
    axes.imshow(canvas, interpolation='nearest', aspect='auto')
    axes.set_axis_off()
    for i, title in enumerate(columns):
        axes.annotate(title, ((i + 0.5) / width, 1), (0, 4), 'axes fraction', 'offset points', fontsize=8, ha='center')
    return figure


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write a figure as ``path`` with .png and .pdf at its end, with the same bytes each time; returns the PNG."""
    for ending, metadata in (('.pdf', dict(CreationDate=None)), ('.png', dict(Software=None))):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending[1:], dpi=DPI, metadata=metadata)
        with atomic_write(path.with_name(f'{path.name}{ending}')) as temporary:
            Path(temporary).write_bytes(buffer.getvalue())
    return buffer.getvalue()
