"""The sections of the page that says whether pretraining helped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor

from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.evaluation.comparison import PROBES, score_encoders, verdict
from mmmilan.evaluation.representation import rankme
from mmmilan.visualization.page import Page
from mmmilan.visualization.pictures import (
    SEEN,
    SEEN_EXPLAINED,
    evaluation_curves,
    loss_curve,
    nearest_neighbours,
    seen_and_predicted,
)

OURS, START, RANDOM, TEACHER = 'pretrained', 'starting point', 'random weights', 'teacher'
LINKS = {'The paper (MILAN, arXiv 2208.06049)': 'https://arxiv.org/abs/2208.06049'}
QUERIES, NEIGHBOURS, PICTURES = 6, 4, 6


@dataclass
class Images:
    """Images as the test pipeline gives them.

    Attributes:
        names: Of the folders that they are from.
        pixels: uint8 [M, 3, H, W], BGR.
        labels: Classes [M], or None where folders name none, or too few images a class.
        classes: Their names.
    """

    names: str
    pixels: Tensor
    labels: np.ndarray | None
    classes: list[str]

    def note(self, index: int) -> str:
        """The class of an image, for a caption."""
        return self.classes[self.labels[index]] if self.labels is not None else ''


def introduction(images: Images) -> str:
    """What the page is about."""
    labels = (
        f'the names of its {len(images.classes)} folders are the classes' if images.labels is not None else 'no labels'
    )
    return (
        f'{len(images.pixels)} images of {images.names}; {labels}. Encoders are frozen, and their class token is '
        'compared. No label was used in pretraining.'
    )


def add_scores(page: Page, features: dict[str, np.ndarray], images: Images) -> None:
    """Accuracies with labels, RankMe in any case, and the sentence that counts."""
    before = START if START in features else RANDOM
    ranks = {name: rankme(rows) for name, rows in features.items()}
    if images.labels is None:
        page.paragraph(
            'There are no labels, so no figure here can say whether pretraining helped; the neighbours below can be '
            f'looked at. RankMe went from {ranks[before]:.1f} ({before}) to {ranks[OURS]:.1f}.',
            'verdict',
        )
        page.heading('RankMe', 'How many directions the features use (arXiv 2210.02885): more is no proof of better.')
        page.table(['encoder', 'RankMe'], [[name, f'{rank:.1f}'] for name, rank in ranks.items()])
        return
    scores = score_encoders(features, images.labels)
    page.paragraph(verdict(scores[OURS]['k-NN'], scores[before]['k-NN'], before, 'k-NN'), 'verdict')
    page.heading(
        'What the frozen encoders know',
        'Top-1 accuracy in percent of the 20 nearest neighbours, and of linear probes with some of the labels, on '
        'three tenths of the images, with intervals of 95 %. Bold is the best of a column, whichever row it is in. '
        'RankMe says how many directions the features use.',
    )
    rows = [[name, *map(str, row.values()), f'{ranks[name]:.1f}'] for name, row in scores.items()]
    values = [[*(accuracy.value for accuracy in row.values()), None] for row in scores.values()]
    page.table(['encoder', *PROBES, 'RankMe'], rows, values)


def add_training(page: Page, checkpoint: str | os.PathLike, config: Config) -> None:
    """Length, time and curves of the training, from its folder."""
    meta = load_checkpoint_file(checkpoint).get('meta') or {}
    folder = Path(checkpoint).parent
    teacher = config.model.head.get('teacher') or {}
    text = (
        f'{meta.get("epoch", config.train_cfg.get("max_epochs"))} epochs in batches of '
        f'{config.train_dataloader.batch_size}, learning rate {config.optim_wrapper.optimizer.lr:g}; the teacher is '
        f'{" ".join(Path(str(teacher.get(key))).name for key in ("model", "pretrained") if teacher.get(key))}.'
    )
    if 'training_seconds' in meta:
        text += f' It took {meta["training_seconds"] / 60:.1f} minutes on {meta["training_device"]}.'
    page.heading('How it was learned', text + ' Against epochs: the training loss, and the evaluations in between.')
    curves = {'training loss': loss_curve(folder)} | evaluation_curves(folder)
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if curves:
        page.curves(curves)


def add_neighbours(page: Page, features: dict[str, np.ndarray], images: Images) -> None:
    """For some images, the most similar ones by each encoder."""
    captions = ' The captions name the classes.' if images.labels is not None else ''
    page.heading(
        'Which images are alike',
        f'An image, then the {NEIGHBOURS} of the others whose features are most like its own, by each encoder.'
        f'{captions}',
    )
    queries = np.linspace(0, len(images.pixels) - 1, QUERIES).astype(int)
    for name, rows in features.items():
        indices = np.concatenate([queries[:, None], nearest_neighbours(rows, queries, NEIGHBOURS)], axis=1)
        page.paragraph(name)
        page.gallery(
            ['image', *(f'neighbour {i + 1}' for i in range(NEIGHBOURS))],
            [[as_rgb(images.pixels[i]) for i in row] for row in indices],
            [f'by {name}, row {i + 1}' for i in range(QUERIES)],
            [[images.note(i) for i in row] for row in indices],
        )


def add_pictures(page: Page, milan: BaseModel, encoders: dict, images: Images) -> None:
    """What the model sees and predicts."""
    backbones = {name: encode.backbone for name, encode in encoders.items() if hasattr(encode, 'backbone')}
    chosen = np.linspace(0, len(images.pixels) - 1, PICTURES).astype(int)
    inputs = milan.data_preprocessor(dict(inputs=images.pixels[chosen]), False)['inputs']
    page.heading('What MILAN sees and predicts', SEEN_EXPLAINED)
    header = [*SEEN, *(f'attention: {name}' for name in backbones)]
    names = [images.note(i) or f'image {i + 1}' for i in chosen]
    page.gallery(header, seen_and_predicted(milan, backbones, inputs), names)


def as_rgb(pixels: Tensor) -> np.ndarray:
    """uint8 [3, H, W] in BGR -> [H, W, 3] in RGB."""
    return pixels.flip(0).permute(1, 2, 0).contiguous().numpy()
