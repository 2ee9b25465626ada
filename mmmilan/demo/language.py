"""What the demo's MILAN knows of words, beside its teacher."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import FUNCTIONS
from torch import Tensor
from torch.utils.data import Dataset

from mmmilan.demo.page import name_of
from mmmilan.evaluation.zero_shot import embed_classes, read_templates
from mmmilan.models import MILAN
from mmmilan.models.text_tower import TextTower
from mmmilan.visualization.figures import draw_heat, to_image
from mmmilan.visualization.page import Page

TEMPLATES = ('a {}',)
NUM_PICTURES = 6


def joint_spaces(milan: MILAN) -> dict[str, Callable[[Tensor], Tensor]]:
    """Images [B, 3, H, W] -> embeddings [B, 1 + N, C] of length 1, of MILAN and of its teacher."""
    return {
        'MILAN': milan.embed_joint,
        'teacher': lambda images: F.normalize(milan.head.run_teacher(images)[0].float(), dim=-1),
    }


@torch.no_grad()
def zero_shot(milan: MILAN, tower: TextTower, dataset: Dataset) -> dict[str, float]:
    """Top-1 accuracy in percent of MILAN and of its teacher on a labelled data set, by the names of its classes."""
    classifier = embed_classes(tower, dataset.metainfo['classes'], read_templates(TEMPLATES))
    loader = torch.utils.data.DataLoader(dataset, batch_size=128, collate_fn=FUNCTIONS.get('default_collate'))
    spaces, hits = joint_spaces(milan), {}
    for batch in map(milan.data_preprocessor, loader):
        labels = torch.cat([sample.gt_label for sample in batch['data_samples']])
        for name, embed in spaces.items():
            predicted = (embed(batch['inputs'])[:, 0] @ classifier.T).argmax(1)
            hits[name] = hits.get(name, 0) + int((predicted == labels).sum())
    return {name: 100 * count / len(dataset) for name, count in hits.items()}


def add_heat_maps(page: Page, milan: MILAN, tower: TextTower, dataset: Dataset) -> None:
    page.heading(
        'What MILAN knows of words',
        "It was shown images alone. But what its decoder predicts lies in the space of the teacher's texts: the "
        "prediction of each patch is compared with the name of the image's class and with that of another class, by "
        'cosine; bright is near. The two maps of a model share a scale. The teacher is shown the same. Patches of a '
        'CLIP may say the name of an object beside it rather than on it (arXiv 2304.05653).',
    )
    header = ['image', *(f'{whose}: {word}' for word in ('its class', 'another') for whose in joint_spaces(milan))]
    names = [name_of(dataset, i) for i in chosen(dataset)]
    page.gallery(header, heat_rows(milan, tower, dataset), names)


def chosen(dataset: Dataset) -> np.ndarray:
    """Indices of images spread over a data set."""
    return np.linspace(0, len(dataset) - 1, NUM_PICTURES).astype(int)


@torch.no_grad()
def heat_rows(milan: MILAN, tower: TextTower, dataset: Dataset) -> list[list[np.ndarray]]:
    """Rows of the gallery, for labelled images spread over the data set."""
    batch = milan.data_preprocessor(FUNCTIONS.get('default_collate')([dataset[i] for i in chosen(dataset)]))
    classifier = embed_classes(tower, dataset.metainfo['classes'], read_templates(TEMPLATES))
    label = torch.cat([sample.gt_label for sample in batch['data_samples']])
    maps = [
        torch.einsum('bnc,bc->bn', embed(batch['inputs'])[:, 1:], classifier[words])
        for words in (label, (label + 1) % len(classifier))
        for embed in joint_spaces(milan).values()
    ]
    images = [to_image(image, milan.data_preprocessor.mean, milan.data_preprocessor.std) for image in batch['inputs']]
    return [[image, *on_two_scales(image, [values[i] for values in maps])] for i, image in enumerate(images)]


def on_two_scales(image: np.ndarray, maps: list[Tensor]) -> list[np.ndarray]:
    """Maps [N] over the image, of MILAN and of the teacher in turn, each model's on a scale of its own."""
    drawn: list[np.ndarray] = [None] * len(maps)
    for first in range(2):
        scale = torch.cat(maps[first::2]).aminmax()
        for i in range(first, len(maps), 2):
            drawn[i] = draw_heat(image, maps[i], 'inferno', limits=(float(scale.min), float(scale.max)))
    return drawn
