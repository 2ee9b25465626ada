"""Evaluate the frozen encoder during pretraining."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from sklearn.model_selection import train_test_split
from torch import nn

from mmmilan.engine.throughput import evaluations_left
from mmmilan.errors import InputError, count
from mmmilan.evaluation.features import class_and_mean, evenly_spaced, extract, join
from mmmilan.evaluation.probes import cosines_to_teacher, knn_accuracy, linear_probe_accuracy, rankme
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import DATASETS, HOOKS

BATCH_SIZE = 64
COMPARED_WITH_TEACHER = 64
PER_CLASS = 10  # images, so that one in five is tested and has neighbours of its class


@HOOKS.register_module()
class OnlineEvaluationHook(Hook):
    """Evaluate the frozen encoder before training, every few epochs, and at the end.

    * ``eval/rankme``: effective rank of the class tokens (arXiv 2210.02885);
    * ``eval/cosine_class``, ``eval/cosine_patches``: cosine between the prediction from unmasked images and the
      teacher's features, on 64 images, where a teacher is at hand;
    * ``eval/knn``, ``eval/probe_10``: for labelled images, top-1 accuracy in percent of 20 nearest neighbours and of a
      linear probe on a tenth of the labels, by the class token. A fifth of the images is held out for testing;
    * ``eval/knn_mean``, ``eval/probe_10_mean``: the same by the mean of the patch tokens. The better of the two
      differs by method.

    The scores go to the log, to TensorBoard and to ``scalars.json``, with their share of the run's time. Training is
    bit-identical to a run without the hook. The processes of a run share the images.

    Args:
        dataset: Config of the images, with their labels if ``with_label=True``.
        interval: Epochs between two evaluations.
        max_images: Maximum number of images, evenly spaced in the data set; of more than ``max_images / 10`` classes,
            those of so many that each has ten on average.
    """

    priority = 'LOW'  # after the logger's line of the epoch's last step

    def __init__(self, dataset: dict, interval: int = 1, max_images: int = 1000) -> None:
        self.dataset_cfg = dataset
        self.interval = interval
        self.max_images = max_images
        self.seconds, self.evaluations = 0.0, 0

    def before_train(self, runner: Runner) -> None:
        self.dataset = DATASETS.build(self.dataset_cfg)
        among = np.arange(len(self.dataset))
        if self.dataset_cfg.get('with_label'):
            labels = self.dataset.get_gt_labels()
            check_labels(labels)
            among = of_some_classes(labels, max(2, self.max_images // PER_CLASS))
        self.chosen = among[evenly_spaced(len(among), self.max_images)]
        self.start = time.monotonic()
        if runner.iter == 0:  # not a run that is resumed within its first epoch
            self.evaluate(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner):
            self.evaluate(runner, runner.epoch + 1)

    def evaluate(self, runner: Runner, epoch: int = 0) -> None:
        """One evaluation, and its line in the log."""
        begin = time.monotonic()
        with evaluating(unwrap(runner.model)) as model:
            scores = self.measure(model)
        now = time.monotonic()
        self.seconds, self.evaluations = self.seconds + now - begin, self.evaluations + 1
        scores = {f'eval/{name}': value for name, value in scores.items()}
        share = self.seconds / (now - self.start)
        text = '  '.join(f'{name}: {value:.4g}' for name, value in scores.items())
        runner.logger.info(
            f'Evaluation after epoch {epoch}:  {text}  ({now - begin:.1f} s; {share:.1%} of the training time so far)'
        )
        runner.visualizer.add_scalars({**scores, 'eval/epoch': epoch, 'eval/time_share': share}, step=runner.iter)

    def seconds_left(self, runner: Runner) -> float:
        """How long the evaluations to come will take, if they take as long as those of this run so far."""
        left = evaluations_left(runner.epoch, runner.max_epochs, self.interval)
        return left * self.seconds / max(1, self.evaluations)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The scores by name."""
        options = dict(batch_size=BATCH_SIZE, num_workers=0)
        extract_from = partial(extract, self.dataset, model.data_preprocessor, **options)
        found = join(extract_from(partial(class_and_mean, model.backbone), indices=self.chosen))
        scores = {}
        if model.has_joint_space:
            compared = self.chosen[:COMPARED_WITH_TEACHER]
            cosines = join(extract_from(partial(cosines_to_teacher, model), indices=compared))
            scores = {name: float(cosines[name].mean()) for name in ('cosine_class', 'cosine_patches')}
        scores['rankme'] = rankme(found['class_token'])
        if self.dataset_cfg.get('with_label'):
            scores |= label_scores(found['class_token'], found['label'])
            means = label_scores(found['mean_token'], found['label'])
            scores |= {f'{name}_mean': value for name, value in means.items()}
        return scores


def of_some_classes(labels: np.ndarray, number: int) -> np.ndarray:
    """The images of at most ``number`` classes: their positions in the data set."""
    classes = np.unique(labels)
    return np.flatnonzero(np.isin(labels, classes[evenly_spaced(len(classes), number)]))


def check_labels(labels: np.ndarray) -> None:
    """Raise an :class:`InputError` if there is only one class, or fewer than five images a class."""
    counts = np.bincount(labels)
    if len(counts) < 2 or len(labels) < 5 * len(counts):
        raise InputError(
            f'{count(len(labels), "image")} of {count(len(counts), "class")} are too few for an evaluation; give a '
            'labelled folder with at least two classes and five images a class.'
        )


def label_scores(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 accuracies in percent on a held-out fifth of the images."""
    train, test, train_labels, test_labels = train_test_split(features, labels, test_size=0.2, random_state=0)
    scores = {'knn': 100 * knn_accuracy((train, train_labels), (test, test_labels))}
    if len(set(train_labels[::10])) > 1:
        tenth = train[::10], train_labels[::10]
        scores['probe_10'] = 100 * linear_probe_accuracy(tenth, (test, test_labels))
    return scores


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Run in evaluation mode without gradients; restore training modes and random states afterwards."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        yield model
    random.setstate(states[0])
    np.random.set_state(states[1])
    for module, mode in modes.items():
        module.training = mode
