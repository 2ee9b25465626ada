"""Scores of an encoder while it is trained; that training does not notice is in tests/api/test_pretrain.py."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mmmilan.engine.online_evaluation import OnlineEvaluationHook, check_labels, evaluating, label_scores
from mmmilan.errors import InputError


def test_scores_of_features_that_know_the_classes_and_of_noise():
    rng, labels = np.random.default_rng(0), np.arange(200) % 4
    good = label_scores(np.eye(4)[labels] + 0.1 * rng.standard_normal((200, 4)), labels)
    noise = label_scores(rng.standard_normal((200, 4)), labels)
    assert good['knn'] == 100 and good['probe_10'] > 70  # four images a class for the probe
    assert max(noise.values()) < 50
    assert set(label_scores(rng.standard_normal((12, 4)), np.arange(12) % 2)) == {'knn'}  # a tenth has one class


def test_too_few_labels():
    check_labels(np.arange(24) % 3)
    for labels, message in (([0, 1, 2], '^3 images of 3 classes are too few for an evaluation; give'), ([0] * 9, '^9')):
        with pytest.raises(InputError, match=message):
            check_labels(np.array(labels))


@pytest.mark.parametrize(('steps', 'evaluations'), [(0, 1), (3, 0)])
def test_a_run_that_goes_on_within_its_first_epoch(steps, evaluations, image_folder, monkeypatch):
    """It was evaluated before it was trained, and is not then what it was."""
    hook, evaluated = OnlineEvaluationHook(dict(type='mmmilan.ImageFolder', data_root=str(image_folder))), []
    monkeypatch.setattr(hook, 'evaluate', evaluated.append)
    hook.before_train(SimpleNamespace(epoch=0, iter=steps))
    assert len(evaluated) == evaluations


def test_training_goes_on_as_if_nothing_had_been_evaluated():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with evaluating(model) as same:
        assert same is model and not model.training and not same(torch.rand(1, 2)).requires_grad
        torch.rand(1), np.random.rand(), random.random()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    assert [module.training for module in model] == [True, False]
