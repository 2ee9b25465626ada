"""The sections of the page that says whether pretraining helped."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.errors import count
from mmmilan.evaluation.comparison import PROBES, comparison, hold_out, most_frequent, score_encoders, verdict
from mmmilan.evaluation.features import evenly_spaced
from mmmilan.evaluation.probes import rankme
from mmmilan.visualization.page import Page
from mmmilan.visualization.pictures import (
    add_predictions,
    evaluation_curves,
    loss_curve,
    nearest_neighbours,
)

OURS, START, RANDOM, TEACHER = 'pretrained', 'starting point', 'random weights', 'teacher'
MEAN = ', mean token'  # after the name of an encoder; the class token goes without saying
QUERIES, NEIGHBOURS, PICTURES = 6, 4, 6


@dataclass
class Images:
    """Images after the test pipeline.

    Attributes:
        names: Names of the folders that they are from.
        dataset: The data set that they are from.
        indices: Their places [M] in it.
        labels: Classes [M]; None if folders do not name classes, or a class has too few images.
        classes: Names of the classes.
    """

    names: str
    dataset: Dataset
    indices: np.ndarray
    labels: np.ndarray | None
    classes: list[str]

    def read(self, index: int) -> Tensor:
        """An image, uint8 [3, H, W], BGR."""
        return self.dataset[int(self.indices[index])]['inputs']

    def note(self, index: int) -> str:
        """The class of an image, for a caption."""
        return self.classes[self.labels[index]] if self.labels is not None else ''


@dataclass
class Bank:
    """Labelled images that neighbours and probes learn from.

    Attributes:
        names: What the page calls them.
        features: Features [K, D] by encoder.
        labels: Classes [K].
    """

    names: str
    features: dict[str, np.ndarray]
    labels: np.ndarray


def introduction(images: Images, title: str = '') -> str:
    """The sentences at the top of the page; ``title`` tells the run from others that it is compared with."""
    labels = (
        f'the names of the folders are the {len(images.classes)} classes' if images.labels is not None else 'no labels'
    )
    return (
        f'{len(images.indices)} images of {images.names}; {labels}. Encoders are frozen, and compared by their class '
        'token and by the mean of their patch tokens: the better one differs by method. No label was used in training.'
        + (f' The encoder called {OURS} is that of {title}.' if title else '')
    )


def add_scores(page: Page, features: dict[str, np.ndarray], images: Images, bank: Bank | None) -> None:
    """Add RankMe, with labels also accuracies, and the sentence that says whether pretraining helped.

    Args:
        page: The page.
        features: Features [M, D] of the images by encoder.
        images: The images.
        bank: Labelled training images; without them, a part of the images is taken.
    """
    before = START if START in features else RANDOM
    ranks = {name: rankme(rows) for name, rows in features.items()}
    if images.labels is None:
        page.paragraph(
            'There are no labels, so no figure here can say whether pretraining helped; the nearest neighbours below '
            f'may give an impression. RankMe went from {ranks[before]:.1f} ({before}) to {ranks[OURS]:.1f}.',
            'verdict',
        )
        page.heading(
            'RankMe', 'The effective rank of the features (arXiv 2210.02885); higher does not have to be better.'
        )
        page.table(['encoder', 'RankMe'], [[name, f'{rank:.1f}'] for name, rank in ranks.items()])
        return
    labels = images.labels
    if bank is None:
        train, test = hold_out(labels)
        bank = Bank('the same folders', {name: rows[train] for name, rows in features.items()}, labels[train])
        features, labels = {name: rows[test] for name, rows in features.items()}, labels[test]
    scores = score_encoders(bank.features, bank.labels, features, labels)
    label, alone = most_frequent(bank.labels, labels)
    page.paragraph(
        f'{verdict(scores[OURS]["k-NN"], scores[before]["k-NN"], before, "k-NN")} Always the most frequent class, '
        f'{images.classes[label]}, is right for {alone.value:.1f} %.',
        'verdict',
    )
    others = [name for name in scores if name.startswith(f'{OURS}: ') and not name.endswith(MEAN)]
    for name in (before, *others):
        pairs = [(scores[f'{each}{token}']['k-NN'] for each in (OURS, name)) for token in ('', MEAN)]
        by_class, by_mean = (comparison(*pair, name, 'k-NN')[0] for pair in pairs)
        if name in others:
            page.paragraph(by_class)
        page.paragraph(f'By the mean of the patch tokens, {by_mean}')
    page.heading(
        'What the frozen encoders know',
        f'Top-1 accuracy in percent on {len(labels)} images, with 95 % confidence intervals: of the 20 nearest '
        f'neighbours among {len(bank.labels)} labelled images of {bank.names}, and of linear probes with some of their '
        'labels. The best of each column is in bold. RankMe is the effective rank of the features.',
    )
    rows = [[name, *map(str, row.values()), f'{ranks[name]:.1f}'] for name, row in scores.items()]
    rows.append([f'always {images.classes[label]}', *[str(alone)] * len(PROBES), ''])
    values = [[*(accuracy.value for accuracy in row.values()), None] for row in scores.values()]
    values.append([alone.value] * len(PROBES) + [None])
    page.table(['encoder', *PROBES, 'RankMe'], rows, values)


def add_training(page: Page, checkpoint: str | os.PathLike, config: Config, recipe: str) -> None:
    """Add length, time and curves of the training, from the folder of the checkpoint; ``recipe`` is a sentence."""
    meta = load_checkpoint_file(checkpoint).get('meta') or {}
    folder = Path(checkpoint).parent
    teachers = teacher_names(config)
    taught = f'; the {"teachers are" if teachers[1:] else "teacher is"} {" and ".join(teachers)}' if teachers else ''
    text = (
        f'{count(meta.get("epoch", config.train_cfg.get("max_epochs")), "epoch")} in batches of '
        f'{config.train_dataloader.batch_size}, learning rate {config.optim_wrapper.optimizer.lr:g}{taught}. {recipe}'
    )
    if isinstance(meta.get('training_seconds'), float):
        text += f' It took {meta["training_seconds"] / 60:.1f} minutes on {meta.get("training_device")}.'
    page.heading('How it was trained', text + ' Over the epochs: the training loss, and evaluations during training.')
    curves = {'training loss': loss_curve(folder)} | evaluation_curves(folder)
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if curves:
        page.curves(curves)


def teacher_names(config: Config) -> list[str]:
    """The teachers of a config, of several targets too, without the folders of their files."""
    names = []
    for part in (config.model.head, *config.model.head.get('targets', [])):
        teacher = part.get('teacher') or {}
        words = [teacher] if isinstance(teacher, str) else [teacher.get('model'), teacher.get('pretrained')]
        names.append(' '.join(re.sub('(^|:)/(?!/).*/', r'\1', str(word)) for word in words if word))
    return list(filter(None, names))


def add_neighbours(page: Page, features: dict[str, np.ndarray], images: Images) -> None:
    """Add the nearest neighbours of some images by each encoder."""
    captions = ' The captions name the classes.' if images.labels is not None else ''
    page.heading(
        'Nearest neighbours',
        f'An image, then its {NEIGHBOURS} nearest neighbours among the other images, by each encoder.{captions}',
    )
    queries = np.array(evenly_spaced(len(images.indices), QUERIES))
    for name, rows in features.items():
        if name.endswith(MEAN):
            continue
        indices = np.concatenate([queries[:, None], nearest_neighbours(rows, queries, NEIGHBOURS)], axis=1)
        page.paragraph(name)
        page.gallery(
            ['image', *(f'neighbour {i + 1}' for i in range(NEIGHBOURS))],
            [[as_rgb(images.read(i)) for i in row] for row in indices],
            [f'by {name}, row {i + 1}' for i in range(QUERIES)],
            [[images.note(i) for i in row] for row in indices],
        )


def add_pictures(page: Page, milan: BaseModel, backbones: dict[str, nn.Module], images: Images) -> None:
    """Add what the model sees and predicts for some images, and the attention of the encoders."""
    chosen = evenly_spaced(len(images.indices), PICTURES)
    inputs = milan.data_preprocessor(dict(inputs=torch.stack([images.read(i) for i in chosen])), False)['inputs']
    add_predictions(page, milan, backbones, inputs, [images.note(i) or f'image {i + 1}' for i in chosen])


def as_rgb(pixels: Tensor) -> np.ndarray:
    """uint8 [3, H, W] in BGR -> [H, W, 3] in RGB."""
    return pixels.flip(0).permute(1, 2, 0).contiguous().numpy()
