"""Zero-shot accuracy and heat maps of texts, of the demo's MILAN and its teacher."""

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
from mmmilan.visualization.figures import draw_heat, to_images
from mmmilan.visualization.page import Page
from mmmilan.visualization.pictures import evenly_spaced

TEMPLATES = ('a {}',)
NUM_PICTURES = 6


def joint_spaces(milan: MILAN) -> dict[str, Callable[[Tensor], Tensor]]:
    """MILAN and its teacher as functions: normalised images [B, 3, H, W] -> embeddings [B, 1 + N, C] of length 1."""
    return {
        'MILAN': milan.embed_joint,
        'teacher': lambda images: F.normalize(milan.head.run_teacher(images)[0].float(), dim=-1),
    }


@torch.no_grad()
def zero_shot(milan: MILAN, tower: TextTower, dataset: Dataset) -> dict[str, float]:
    """Zero-shot top-1 accuracy in percent of MILAN and of its teacher on a labelled data set."""
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
    """Add heat maps of texts on some images of a labelled data set."""
    page.heading(
        'Texts in images',
        'MILAN was trained on images only, but its decoder predicts features in the joint space of image and text of '
        "its teacher. The maps show the cosine of each patch's prediction with the name of the image's class, and with "
        'the name of another class; bright is high. The two maps of a model share one scale. For the teacher, its own '
        "features take the place of the predictions. Features of CLIP's patches can match an object beside the patch "
        'rather than on it (arXiv 2304.05653).',
    )
    indices = evenly_spaced(len(dataset), NUM_PICTURES)
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
