"""Encoders, and models trained from them, compared on the same labelled images with their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from mmmilan.evaluation.predictions import bootstrap
from mmmilan.evaluation.probes import knn_predictions, linear_probe_predictions

TEST_SHARE = 0.3
PROBES = {'k-NN': None, 'probe, 1 % of labels': 0.01, 'probe, 10 %': 0.1, 'probe, all': 1.0}


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent, with the bootstrap's interval of 95 % over the test images.

    Attributes:
        correct: Whether each test image was predicted right, bool [T].
    """

    correct: np.ndarray

    @property
    def value(self) -> float:
        return 100 * float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        return bootstrap(self.correct.astype(float))

    def __str__(self) -> str:
        """The value, and below it the interval, as a table has it."""
        low, high = self.interval
        return f'{self.value:.1f}\n{low:.1f} to {high:.1f}'


def hold_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of seven tenths of the images of each class, to learn from, and of the others, to test on.

    Args:
        labels: Classes [M], at least two and four images of each.
    """
    return tuple(train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, random_state=0, stratify=labels))


def score_encoders(
    train: dict[str, np.ndarray], train_labels: np.ndarray, test: dict[str, np.ndarray], test_labels: np.ndarray
) -> dict[str, dict[str, Accuracy]]:
    """Accuracies by encoder and probe: 20 nearest neighbours, and linear probes with some of the labels.

    Of few labels, each class keeps at least one.

    Args:
        train: Name of the encoder and its features [K, D] of labelled images.
        train_labels: Their classes [K], at least two.
        test: Features [M, D] of the test images, by encoder.
        test_labels: Their classes [M].
    """
    scores: dict[str, dict[str, Accuracy]] = {}
    for name, rows in train.items():
        scores[name] = {}
        for probe, share in PROBES.items():
            some = np.arange(len(rows)) if share is None else few_labels(train_labels, share)
            predict = knn_predictions if share is None else linear_probe_predictions
            predicted = predict((rows[some], train_labels[some]), test[name])
            scores[name][probe] = Accuracy(predicted == test_labels)
    return scores


def most_frequent(train_labels: np.ndarray, test_labels: np.ndarray) -> tuple[int, Accuracy]:
    """The most frequent class of the labelled images, and how often it is right by itself."""
    label = int(np.bincount(train_labels).argmax())
    return label, Accuracy(test_labels == label)


def few_labels(labels: np.ndarray, share: float) -> np.ndarray:
    """Places of a share of the images of each class, at least one."""
    of_classes = (np.flatnonzero(labels == label) for label in np.unique(labels))
    return np.concatenate([places[: max(1, round(share * len(places)))] for places in of_classes])


def comparison(one: Accuracy, other: Accuracy, name: str, probe: str) -> tuple[str, float, float]:
    """A sentence on two encoders on the same images, and the interval of 95 % of their difference.

    Args:
        one: Of the pretrained encoder.
        other: Of the other one.
        name: What the sentence calls the other one.
        probe: What was measured.
    """
    difference = one.correct.astype(float) - other.correct.astype(float)
    low, high = bootstrap(difference)
    sentence = (
        f'{probe} gets {one.value:.1f} % of {len(difference)} images right against {other.value:.1f} % with {name} '
        f'(difference {100 * difference.mean():+.1f}, 95 % interval {low:+.1f} to {high:+.1f}).'
    )
    return sentence, low, high


def verdict(after: Accuracy, before: Accuracy, name: str, probe: str) -> str:
    """One sentence: whether an encoder is better than another one on the same images, see :func:`comparison`."""
    figures, low, high = comparison(after, before, name, probe)
    if low > 0:
        return f'Pretraining helped: {figures}'
    return (
        f'Pretraining did harm: {figures}' if high < 0 else f'Pretraining made no difference to be sure of: {figures}'
    )


# -- models trained from two starts


ENOUGH = 20  # validation images for a verdict: resampling fewer of them gives intervals that are too short
SCORES = dict(classification='top-1 accuracy', detection='AP of an image', segmentation='IoU of an image')


def compare_models(first: dict[str, float], second: dict[str, float], task: str, name: str) -> dict[str, Any]:
    """Compare two models by their scores of the same images, with a paired bootstrap.

    Args:
        first: Path of an image -> the score of the model in question, from 0 to 1.
        second: Of the other model.
        task: Of both.
        name: What the other one starts from.

    Returns:
        ``sentence``; ``score``, what is compared; ``means`` of both and the ``difference`` with its ``interval`` of
        95 %, in percent; ``images``, their paths; and ``scores``, by model. All of it can be written as JSON.
    """
    images = sorted(first.keys() & second.keys())
    values = [np.array([scores[image] for image in images]) for scores in (first, second)]
    means = [100 * float(each.mean()) if images else 0.0 for each in values]
    low, high = bootstrap(values[0] - values[1]) if images else (0.0, 0.0)
    said = 'helped' if low > 0 else 'did harm' if high < 0 else 'made no difference to be sure of'
    if len(images) < ENOUGH:
        said = f'cannot be judged by fewer than {ENOUGH} images'
    sentence = (
        f'Pretraining {said}: {SCORES[task]} after one training each, mean of {len(images)} validation images, '
        f'{means[0]:.1f} % against {means[1]:.1f} % from {name} (difference {means[0] - means[1]:+.1f}, '
        f'95 % interval {low:+.1f} to {high:+.1f}).'
    )
    if not any(means):
        sentence = (
            f'Nothing can be said of pretraining: {SCORES[task]} is 0 in all of {len(images)} validation images with '
            f'annotations, and from {name}, too; train longer, or with more images.'
        )
    return dict(
        sentence=sentence,
        score=SCORES[task],
        name=name,
        means=means,
        difference=means[0] - means[1],
        interval=[low, high],
        images=images,
        scores=[each.tolist() for each in values],
    )
