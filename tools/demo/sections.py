"""The sections of the demo's page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import FUNCTIONS
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmmilan.evaluation.features import evenly_spaced, extract, join
from mmmilan.evaluation.zero_shot import embed_classes, nearest_text, read_templates
from mmmilan.models import MILAN
from mmmilan.teachers.base import TextTower
from mmmilan.visualization.page import Page
from mmmilan.visualization.pictures import (
    add_predictions,
    draw_heat,
    loss_curve,
    to_images,
)

NUM_PICTURES = 8
STARTS = ('MILAN', 'random')  # of fine-tuning, as it compares them
TEMPLATES = ('a {}',)
NUM_HEAT_MAPS = 6


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


def add_transfer(page: Page, compared: dict[str, dict], folders: dict[str, str]) -> None:
    """Add the scores after fine-tuning: the comparisons of ``mmmilan.finetune`` by task, which wrote these folders."""
    page.heading(
        'Transfer to other tasks',
        'mmmilan finetune for each task, from the MILAN checkpoint and from random weights, with one schedule and the '
        'same images: means over images not seen in training, in percent, and the 95 % interval of the difference over '
        f'these images. Pictures and classes: {", ".join(f"{name}/report.html" for name in folders.values())}.',
    )
    rows = [
        [
            task,
            each['score'],
            *(f'{mean:.1f}' for mean in each['means']),
            '{:+.1f} to {:+.1f}'.format(*each['interval']),
        ]
        for task, each in compared.items()
    ]
    page.table(['task', 'score', *STARTS, 'difference'], rows)


def joint_spaces(milan: MILAN) -> dict[str, Callable[[Tensor], Tensor]]:
    """MILAN and its teacher as functions: normalised images [B, 3, H, W] -> embeddings [B, 1 + N, C] of length 1."""
    return {
        'MILAN': milan.embed_joint,
        'teacher': lambda images: F.normalize(milan.head.run_teacher(images)[0].float(), dim=-1),
    }


def zero_shot(milan: MILAN, tower: TextTower, dataset: Dataset) -> dict[str, float]:
    """Zero-shot top-1 accuracy in percent of MILAN and of its teacher on a labelled data set."""
    classifier = embed_classes(tower, dataset.metainfo['classes'], read_templates(TEMPLATES))
    spaces = {name: lambda images, embed=embed: embed(images)[:, 0] for name, embed in joint_spaces(milan).items()}
    batches = extract(
        dataset, milan.data_preprocessor, nearest_text(spaces, classifier), 'Zero-shot classification', batch_size=128
    )
    found = join(batches)
    return {name: 100 * float((found[name] == found['label']).mean()) for name in spaces}


def add_heat_maps(page: Page, milan: MILAN, tower: TextTower, dataset: Dataset) -> None:
    """Add heat maps of texts on some images of a labelled data set."""
    page.heading(
        'Texts in images',
        'MILAN was trained on images only, but its decoder predicts features in the joint space of image and text of '
        "its teacher. The maps show the cosine of each patch's prediction with the name of the image's class, and with "
        'the name of another class; bright is high. The two maps of a model share one scale. For the teacher, its own '
        "features take the place of the predictions. Features of CLIP's patches can match an object beside the patch "
        'rather than on it (arXiv 2304.05653).',
    )
    indices = evenly_spaced(len(dataset), NUM_HEAT_MAPS)
    header = ['image', *(f'{whose}: {word}' for word in ('its class', 'another') for whose in joint_spaces(milan))]
    rows = draw_heat_maps(milan, tower, dataset, indices)
    page.gallery(header, rows, [name_of(dataset, i) for i in indices])


@torch.no_grad()
def draw_heat_maps(milan: MILAN, tower: TextTower, dataset: Dataset, indices: list[int]) -> list[list[np.ndarray]]:
    """Rows of the gallery: each image, then the maps of its class and of another class, by MILAN and by the teacher."""
    batch = milan.data_preprocessor(FUNCTIONS.get('default_collate')([dataset[i] for i in indices]))
    classifier = embed_classes(tower, dataset.metainfo['classes'], read_templates(TEMPLATES))
    label = torch.cat([sample.gt_label for sample in batch['data_samples']])
    maps = [
        torch.einsum('bnc,bc->bn', embed(batch['inputs'])[:, 1:], classifier[words])
        for words in (label, (label + 1) % len(classifier))
        for embed in joint_spaces(milan).values()
    ]
    images = to_images(batch['inputs'], milan.data_preprocessor)
    return [[image, *draw_on_two_scales(image, [values[i] for values in maps])] for i, image in enumerate(images)]


def draw_on_two_scales(image: np.ndarray, maps: list[Tensor]) -> list[np.ndarray]:
    """Draw maps [N] over the image; maps of MILAN and of the teacher alternate, and each model has its own scale."""
    drawn: list[np.ndarray] = [None] * len(maps)
    for first in range(2):
        scale = torch.cat(maps[first::2]).aminmax()
        for i in range(first, len(maps), 2):
            drawn[i] = draw_heat(image, maps[i], 'inferno', limits=(float(scale.min), float(scale.max)))
    return drawn
