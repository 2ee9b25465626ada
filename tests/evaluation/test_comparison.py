"""Accuracies of encoders on the same images, their intervals, and what is concluded from them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mmmilan.evaluation.comparison import (
    Accuracy,
    compare_models,
    few_labels,
    hold_out,
    most_frequent,
    score_encoders,
    verdict,
)
from mmmilan.visualization.pictures import nearest_neighbours


def test_verdict_follows_the_figures():
    rng = np.random.default_rng(0)
    better, worse = Accuracy(rng.random(300) < 0.8), Accuracy(rng.random(300) < 0.5)
    assert verdict(better, worse, 'random weights', 'k-NN').startswith('Pretraining helped: k-NN gets ')
    assert verdict(worse, better, 'random weights', 'k-NN').startswith('Pretraining did harm')
    assert verdict(better, better, 'random weights', 'k-NN').startswith('Pretraining made no difference')
    low, high = better.interval
    error = 196 * np.sqrt(better.value / 100 * (1 - better.value / 100) / 300)  # the normal approximation
    assert low == pytest.approx(better.value - error, abs=1) and high == pytest.approx(better.value + error, abs=1)


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    good = np.eye(4)[labels] + 0.3 * rng.standard_normal((200, 4))
    train, test = hold_out(labels)
    features = dict(good=good.astype(np.float32), noise=rng.standard_normal((200, 4)))
    parts = ({name: rows[part] for name, rows in features.items()} for part in (train, test))
    scores = score_encoders(next(parts), labels[train], next(parts), labels[test])
    assert len(test) == 60 and np.bincount(labels[test]).tolist() == [15] * 4
    assert scores['good']['k-NN'].value > 85 > 45 > scores['noise']['k-NN'].value
    assert scores['good']['probe, all'].value >= scores['good']['probe, 1 % of labels'].value > 40
    assert len(few_labels(labels, 0.01)) == 4 and len(few_labels(labels, 0.1)) == 20
    unit = good / np.linalg.norm(good, axis=1, keepdims=True)
    expected = KNeighborsClassifier(5).fit(unit, labels).kneighbors(unit[:3], return_distance=False)[:, 1:]
    assert np.array_equal(nearest_neighbours(good, np.arange(3), 4), expected)


def test_the_most_frequent_class():
    label, alone = most_frequent(np.array([2, 0, 2, 1]), np.array([0, 2, 2, 2, 1]))
    assert label == 2 and alone.value == 60


def test_models_are_compared_on_the_images_of_both():
    first, second = {str(i): 1.0 for i in range(40)}, {str(i): float(i % 2) for i in range(1, 41)}
    result = compare_models(first, second, 'classification', 'random weights')
    assert result['sentence'].startswith(
        'Pretraining helped: top-1 accuracy after one training each, mean of 39 validation images, 100.0 %'
    )
    assert result['means'][0] == 100 and 0 < result['interval'][0] < result['difference'] < result['interval'][1]


@pytest.mark.parametrize('images', [0, 3])
def test_models_that_know_nothing_are_not_compared(images):
    scores = {str(i): 0.0 for i in range(images)}
    result = compare_models(scores, scores, 'detection', 'random weights')
    assert result['sentence'].startswith(f'Nothing can be said of pretraining: AP of an image is 0 in all of {images} ')
    assert result['interval'] == [0, 0] and result['difference'] == 0


def test_a_handful_of_images_gives_no_verdict():
    first, second = {str(i): 1.0 for i in range(19)}, {str(i): 0.0 for i in range(19)}
    sentence = compare_models(first, second, 'classification', 'random weights')['sentence']
    assert sentence.startswith('Pretraining cannot be judged by fewer than 20 images: top-1 accuracy ')
