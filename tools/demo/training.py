"""Training with a progress bar."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmmilan.datasets.splits import class_folders
from mmmilan.evaluation.features import extract, join
from mmmilan.evaluation.probes import knn_accuracy, linear_probe_accuracy

console = Console()


class ProgressHook(Hook):
    """A progress bar in place of MMEngine's log lines, which are only written to the work dir."""

    def __init__(self, description: str) -> None:
        columns = [TextColumn('{task.description:18}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self.progress = Progress(*columns, TextColumn('loss {task.fields[loss]}'), console=console)
        self.description = description

    def before_train(self, runner: Runner) -> None:
        self.task = self.progress.add_task(self.description, total=runner.max_iters, loss='')
        self.progress.start()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.progress.update(self.task, completed=runner.iter + 1, loss=f'{outputs["loss"].item():.3f}')

    def after_train(self, runner: Runner) -> None:
        self.progress.stop()

    def before_test(self, runner: Runner) -> None:
        self.task = self.progress.add_task(f'{self.description}: test', total=len(runner.test_dataloader), loss='')
        self.progress.start()

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.progress.update(self.task, completed=batch_idx + 1)

    def after_test(self, runner: Runner) -> None:
        self.progress.stop()


def train(cfg: Config, description: str) -> tuple[Runner, float]:
    """Train from a config; returns the runner and the seconds that training took."""
    cfg.log_level = 'ERROR'
    cfg.default_hooks.checkpoint.interval = -1  # only the last one
    cfg.experiment_name = f'{Path(cfg.work_dir).name}-{time.time_ns()}'
    runner = Runner.from_cfg(cfg)
    runner.register_hook(ProgressHook(description))
    start = time.time()
    runner.train()
    return runner, time.time() - start


PROBES = ('linear probe', 'with 10 % of the labels', 'k-NN')


def probing_datasets(cfg: Config, args: argparse.Namespace) -> list[Dataset]:
    """Labelled data: train and test set, or a single data set to split; [] if folders do not name classes."""
    folders = [args.out / 'scenes' / split for split in ('train', 'val')]
    if args.data:
        root, classes = class_folders(args.data)
        folders = [root] if classes else []
    dataset = cfg.test_dataloader.dataset
    return [DATASETS.build({**dataset, 'data_root': str(folder), 'with_label': True}) for folder in folders]


def probe(
    normalise: nn.Module, encoders: dict[str, Callable[[Tensor], Tensor]], datasets: list[Dataset]
) -> dict[str, dict[str, float]]:
    """Top-1 accuracies in percent of each of ``PROBES`` by encoder.

    Args:
        normalise: The models' data preprocessor.
        encoders: Functions from normalised images [B, 3, H, W] to features [B, D], by name.
        datasets: See :func:`probing_datasets`.
    """

    def encode(images: Tensor) -> dict[str, Tensor]:
        return {name: encoder(images) for name, encoder in encoders.items()}

    parts = [join(extract(dataset, normalise, encode, 'Features', batch_size=128)) for dataset in datasets]
    if len(parts) == 1:
        places = train_test_split(np.arange(len(parts[0]['label'])), test_size=0.2, random_state=0)
        parts = [{name: rows[chosen] for name, rows in parts[0].items()} for chosen in places]
    scores = {}
    for name in encoders:
        (features, labels), test = ((part[name], part['label']) for part in parts)
        accuracies = (
            linear_probe_accuracy((features, labels), test),
            linear_probe_accuracy((features[::10], labels[::10]), test),
            knn_accuracy((features, labels), test),
        )
        scores[name] = {probe: 100 * accuracy for probe, accuracy in zip(PROBES, accuracies, strict=True)}
    return scores
