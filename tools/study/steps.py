"""Time the training steps of all arms in turns, in one process."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from arms import LIGHTLY, NO_PRETRAINING, read_arm
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmmilan.files import write_text


def save_random_teacher(path: str) -> None:
    """Save a teacher of the study's size with random weights, which do not affect the time."""
    cfg = read_arm('teacher')
    torch.save(MODELS.build(cfg.model).state_dict(), path)


def time_steps(args: argparse.Namespace) -> None:
    """Print, and write to ``args.json``, the milliseconds per image of each arm: median and quartiles over rounds.

    In a round, each arm takes one step on a batch of its config's size; the images are on the device already.
    """
    torch.set_num_threads(1)
    init_default_scope('mmpretrain')
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    with tempfile.NamedTemporaryFile(suffix='.pth') as file:
        save_random_teacher(file.name)
        arms = [arm for arm in args.arms if arm not in (LIGHTLY, NO_PRETRAINING)]
        steps = {arm: training_step(arm, file.name) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for i in track(range(args.rounds + 1), 'Rounds', transient=True):
        for arm, (step, images) in steps.items():
            start = time.process_time()
            step()
            if i:  # the first round warms up
                seconds[arm].append((time.process_time() - start) / images)
    figures = {}
    for arm, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        epochs = read_arm(arm).train_cfg.max_epochs
        figures[arm] = dict(ms_per_image=1e3 * quartiles[1], quartiles=[1e3 * q for q in quartiles], epochs=epochs)
    table = Table('arm', 'ms per image', 'quartiles', 'epochs', title='CPU time of a training step, one thread')
    for arm, row in figures.items():
        low, _, high = row['quartiles']
        table.add_row(arm, f'{row["ms_per_image"]:.2f}', f'{low:.2f} to {high:.2f}', str(row['epochs']))
    Console().print(table)
    if args.json:
        write_text(args.json, json.dumps(figures, indent=2) + '\n')


def training_step(arm: str, teacher: str) -> tuple[Callable, int]:
    """A function that takes a training step of an arm, and the number of images in the step."""
    cfg = read_arm(arm)
    if cfg.model.head.get('teacher'):
        cfg.model.head.teacher.pretrained = teacher
    model = MODELS.build(cfg.model)
    model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    size, images = cfg.model.backbone.img_size, cfg.train_dataloader.batch_size
    batch = dict(inputs=torch.randint(256, (images, 3, size, size), dtype=torch.uint8), data_samples=None)
    return (lambda: model.train_step(batch, wrapper)), images
