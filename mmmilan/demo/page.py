"""The sections of the demo's page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.registry import FUNCTIONS
from torch import nn
from torch.utils.data import Dataset

from mmmilan.visualization.figures import class_colours
from mmmilan.visualization.page import Page
from mmmilan.visualization.pictures import add_predictions, evenly_spaced, loss_curve

NUM_PICTURES = 8


def add_scores(page: Page, header: list[str], rows: list[list[str]], values: list[list[float | None]]) -> None:
    """Add the table of accuracies of the frozen encoders."""
    page.heading(
        'What the frozen encoders know',
        'Top-1 accuracy in percent of a linear probe and of the 20 nearest neighbours, on the class token, for images '
        "not seen in training. Zero-shot: by the names of the classes only, with the teacher's text tower. The best of "
        'each column is in bold. The teacher was trained on captions, the others on images only.',
    )
    page.table(header, rows, values)


def add_pictures(page: Page, encoders: dict[str, nn.Module], dataset: Dataset) -> None:
    """Add what MILAN sees and predicts for some images of a data set."""
    milan, indices = encoders['MILAN'], evenly_spaced(len(dataset), NUM_PICTURES)
    batch = milan.data_preprocessor(FUNCTIONS.get('default_collate')([dataset[i] for i in indices]))
    backbones = {name: encoder.backbone for name, encoder in encoders.items()}
    add_predictions(page, milan, backbones, batch['inputs'], [name_of(dataset, i) for i in indices])


def name_of(dataset: Dataset, index: int) -> str:
    """The class of an image, or its number if the data set has no labels."""
    classes = dataset.metainfo.get('classes')
    return classes[dataset.get_data_info(index)['gt_label']] if classes else f'image {index + 1}'


def add_curves(page: Page, work_dirs: dict[str, Path]) -> None:
    """Add the training losses that are logged in these work dirs."""
    page.heading('Training', 'Training losses. They measure different things: compare their shapes, not their values.')
    page.curves({f'{name}: loss': loss_curve(folder) for name, folder in work_dirs.items()})


def add_transfer(
    page: Page,
    header: list[str],
    rows: list[list[str]],
    titles: list[str],
    pictures: list[list[np.ndarray]],
    classes: Sequence[str],
) -> None:
    """Add the scores after fine-tuning, and pictures of annotations and predictions."""
    page.heading(
        'Transfer to other tasks',
        'Short fine-tuning of all layers for each task, from the MILAN checkpoint or from random weights, with one '
        'schedule; in percent, on images not seen in training. Boxes are labelled with their class; the legend below '
        'the pictures gives the colours of the label maps.',
    )
    page.table(header, rows)
    page.gallery(titles, pictures, [f'scene {i + 1}' for i in range(len(pictures))])
    page.legend(classes, class_colours(len(classes)))
