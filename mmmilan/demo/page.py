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
from mmmilan.visualization.pictures import SEEN, SEEN_EXPLAINED, loss_curve, seen_and_predicted

NUM_PICTURES = 8
LINKS = {'The paper (MILAN, arXiv 2208.06049)': 'https://arxiv.org/abs/2208.06049'}


def add_scores(page: Page, header: list[str], rows: list[list[str]], values: list[list[float | None]]) -> None:
    page.heading(
        'What the frozen encoders know',
        'Top-1 accuracy in percent of a linear probe and of the 20 nearest neighbours, on the class token, for images '
        "not seen in training. Zero-shot: by the names of the classes alone, through the teacher's text tower. Bold is "
        'the best of a column, whichever row it is in. The teacher was trained on captions, the others on images.',
    )
    page.table(header, rows, values)


def add_pictures(page: Page, encoders: dict[str, nn.Module], dataset: Dataset) -> None:
    """The image, what the model sees of it, and what it makes of that, for images spread over the data set."""
    indices = np.linspace(0, len(dataset) - 1, NUM_PICTURES).astype(int)
    batch = encoders['MILAN'].data_preprocessor(FUNCTIONS.get('default_collate')([dataset[i] for i in indices]))
    page.heading('What MILAN sees and predicts', SEEN_EXPLAINED)
    header = [*SEEN, *(f'attention: {name}' for name in encoders)]
    backbones = {name: encoder.backbone for name, encoder in encoders.items()}
    rows = seen_and_predicted(encoders['MILAN'], backbones, batch['inputs'])
    page.gallery(header, rows, [name_of(dataset, i) for i in indices])


def name_of(dataset: Dataset, index: int) -> str:
    """What is on an image, where its folder says it."""
    classes = dataset.metainfo.get('classes')
    return classes[dataset.get_data_info(index)['gt_label']] if classes else f'image {index + 1}'


def add_curves(page: Page, work_dirs: dict[str, Path]) -> None:
    page.heading('How it was learned', 'Training loss. Each measures something else, so compare shapes, not heights.')
    page.curves({f'{name}: loss': loss_curve(folder) for name, folder in work_dirs.items()})


def add_transfer(
    page: Page,
    header: list[str],
    rows: list[list[str]],
    titles: list[str],
    pictures: list[list[np.ndarray]],
    classes: Sequence[str],
) -> None:
    page.heading(
        'What the encoder is worth elsewhere',
        'The MILAN checkpoint, or random weights, as the start of a short training of all layers for each task, with '
        'the same schedule; in percent, on images not seen in training. Boxes are named by the class they hold; the '
        'colours of the label maps are explained below the pictures.',
    )
    page.table(header, rows)
    page.gallery(titles, pictures, [f'scene {i + 1}' for i in range(len(pictures))])
    page.legend(classes, class_colours(len(classes)))
