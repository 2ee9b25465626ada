"""Real processes, really killed: what is left goes on to the weights of an uninterrupted run, bit by bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset

from helpers import assert_identical, load_trusted, rest_slow
from mmmilan.checkpoints.io import find_newest
from mmmilan.engine.loops import StepSeedHook
from mmmilan.engine.stopping import RESUMABLE, StopHook
from mmmilan.engine.work_dir import locked
from processes import exit_code
from small_runs import runner

EPOCHS = 8
LAST = f'iter_{5 * EPOCHS}.pth'


class AlarmHook(Hook):
    """End this process, or send it a signal, within a step, after ``part`` of the duration of the step before.

    Without a handler SIGALRM ends a process between any two instructions, as SIGKILL does.
    """

    def __init__(self, step: int, part: float, number: int) -> None:
        self.step, self.part, self.number = step, part, number
        self.count, self.begin = 0, 0.0

    def before_train(self, runner):
        if self.number != signal.SIGALRM:
            signal.signal(signal.SIGALRM, lambda *args: os.kill(os.getpid(), self.number))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        now = time.monotonic()
        if self.count == self.step:
            signal.setitimer(signal.ITIMER_REAL, self.part * (now - self.begin))
        self.count, self.begin = self.count + 1, now


class Pictures(Dataset):
    """Ten images of noise in two classes."""

    metainfo: dict = {}

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % 2))


def fine_tuning() -> dict:
    """Arguments of a run that fine-tunes a ViT as the recipe does, with mixup and cutmix."""
    arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    backbone = dict(type='mmpretrain.VisionTransformer', arch=arch, img_size=32, patch_size=16, drop_path_rate=0.1)
    loss = dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    model = dict(
        type='mmpretrain.ImageClassifier',
        backbone=backbone | dict(out_type='avg_featmap', final_norm=False),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=2, in_channels=16, loss=loss),
        data_preprocessor=dict(type='mmmilan.ClassificationDataPreprocessor', num_classes=2, mean=[128.0], std=[64.0]),
        train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
    )
    loader = dict(dataset=Pictures(), batch_size=2, num_workers=0, collate_fn=dict(type='default_collate'))
    loader['sampler'] = dict(type='DefaultSampler', shuffle=True, seed=0)
    return dict(model=model, train_dataloader=loader, randomness=dict(seed=0))


def train(work_dir: Path, task: Callable[[], dict], alarm: AlarmHook | None = None) -> None:
    """Start or resume a run of 40 steps that saves after each step."""
    with locked(work_dir):
        newest = find_newest(work_dir)
        start = dict(load_from=str(newest), resume=True) if newest else {}
        loop, checkpoint = dict(type='mmmilan.EpochLoop', max_epochs=EPOCHS), dict(by_epoch=False, max_keep_ckpts=1)
        built = runner(work_dir, length=10, train_cfg=loop, checkpoint=checkpoint, **start, **task())
        built.register_hook(StepSeedHook())
        built.register_hook(StopHook())
        if alarm:
            built.register_hook(alarm)
        built.train()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A function that gives the last checkpoint of an uninterrupted run of a task, which is trained once."""

    @cache
    def checkpoint(task: Callable[[], dict]) -> dict:
        work_dir = tmp_path_factory.mktemp('whole')
        train(work_dir, task)
        return load_trusted(work_dir / LAST)

    return checkpoint


@pytest.mark.parametrize('seed', rest_slow(range(20), 0))
@pytest.mark.parametrize(
    'number, task',
    [
        (signal.SIGALRM, dict),
        pytest.param(signal.SIGTERM, dict, marks=pytest.mark.slow),
        pytest.param(signal.SIGALRM, fine_tuning, marks=pytest.mark.slow),
    ],
)
def test_ended_at_any_moment(tmp_path, safe_mmengine, whole, number, task, seed):
    """The run spends most of its time saving, and keeps one checkpoint."""
    rng = random.Random(seed)
    for _ in range(5):  # which ends long before step 40
        alarm = AlarmHook(rng.randint(2, 5), rng.random(), number)
        expected = RESUMABLE if number == signal.SIGTERM else -number
        assert exit_code(train, tmp_path / 'work', task, alarm) == expected
    train(tmp_path / 'work', task)
    assert_identical(load_trusted(tmp_path / 'work' / LAST), whole(task))
    assert {path.name for path in (tmp_path / 'work').glob('*iter*')} == {LAST}
