"""The sections of the demo's page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import FUNCTIONS
from torch import nn
from torch.utils.data import Dataset

from mmmilan.visualization.figures import draw_curves, draw_heat, draw_mask, last_attention, to_image
from mmmilan.visualization.page import Page

NUM_PICTURES = 8


def add_scores(page: Page, header: list[str], rows: list[list[str]]) -> None:
    page.heading(
        'What the frozen encoders know',
        'Top-1 accuracy in percent of a linear probe and of the 20 nearest neighbours, on the class token, for images '
        "not seen in training. Zero-shot: by the names of the classes alone, through the teacher's text tower.",
    )
    page.table(header, rows, best=0)


def add_pictures(page: Page, encoders: dict[str, nn.Module], dataset: Dataset) -> None:
    page.heading(
        'What MILAN sees and predicts',
        'The image; how important CLIP finds each patch; the patches drawn by importance, which are all that the '
        'encoder sees; the loss of each patch (dark is high); and where the class token looks in the last block of '
        'each encoder.',
    )
    header = ['image', 'importance', 'visible', 'loss', *(f'attention: {name}' for name in encoders)]
    page.gallery(header, picture_rows(encoders, dataset))


@torch.no_grad()
def picture_rows(encoders: dict[str, nn.Module], dataset: Dataset) -> list[list[np.ndarray]]:
    """Rows of the gallery, for images spread over the data set."""
    milan = encoders['MILAN']
    indices = np.linspace(0, len(dataset) - 1, NUM_PICTURES).astype(int)
    batch = milan.data_preprocessor(FUNCTIONS.get('default_collate')([dataset[i] for i in indices]))
    images = batch['inputs']
    attention = [last_attention(encoder.backbone, images) for encoder in encoders.values()]
    rows = []
    for i, sample in enumerate(milan.predict(images)):
        image = to_image(images[i], milan.data_preprocessor.mean, milan.data_preprocessor.std)
        row = [image, draw_heat(image, sample.importance, 'inferno'), draw_mask(image, sample.mask)]
        row += [draw_heat(image, sample.patch_loss, 'Greens')]
        rows.append(row + [draw_heat(image, maps[i], 'inferno') for maps in attention])
    return rows


def add_curves(page: Page, work_dirs: dict[str, Path]) -> None:
    page.heading('How it was learned', 'Training loss. Each measures something else, so compare shapes, not heights.')
    page.svg(draw_curves({name: read_curve(folder) for name, folder in work_dirs.items()}, 'loss'))


def read_curve(folder: Path) -> tuple[list[float], list[float]]:
    """Epochs and losses that MMEngine's visualizer wrote in the last run of a work dir."""
    path = max(folder.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if 'loss' in row]
    last = rows[-1]['step']
    return [rows[-1]['epoch'] * row['step'] / last for row in rows], [row['loss'] for row in rows]


def add_transfer(
    page: Page, header: list[str], rows: list[list[str]], titles: list[str], pictures: list[list[np.ndarray]]
) -> None:
    page.heading(
        'What the encoder is worth elsewhere',
        'The MILAN checkpoint, or random weights, as the start of a short training of all layers for each task, with '
        'the same schedule; in percent, on images not seen in training.',
    )
    page.table(header, rows)
    page.gallery(titles, pictures)
