"""Real processes, really killed: what is left goes on to the weights of an uninterrupted run, bit by bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from mmengine.hooks import Hook

from helpers import assert_identical, load_trusted
from mmmilan.engine.stopping import GO_ON, StopHook
from mmmilan.engine.work_dir import find_newest, locked
from small_runs import runner

EPOCHS = 8


class AlarmHook(Hook):
    """Ends this process, or sends it a signal, somewhere in a step: at a part of the time that the step before took.

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


def train(work_dir: Path, alarm: AlarmHook | None = None) -> None:
    """A whole run of 40 steps that saves after every one of them, or the rest of one."""
    with locked(work_dir):
        newest = find_newest(work_dir)
        start = dict(load_from=str(newest), resume=True) if newest else {}
        loop, checkpoint = dict(type='mmmilan.EpochLoop', max_epochs=EPOCHS), dict(by_epoch=False, max_keep_ckpts=1)
        built = runner(work_dir, length=10, train_cfg=loop, checkpoint=checkpoint, **start)
        built.register_hook(StopHook())
        if alarm:
            built.register_hook(alarm)
        built.train()


@pytest.mark.parametrize('seed', [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
@pytest.mark.parametrize('number', [signal.SIGALRM, signal.SIGTERM])
def test_ended_at_any_moment(tmp_path, safe_mmengine, number, seed):
    """Most of the time of this run goes into saving, of which one file is kept."""
    rng = random.Random(seed)
    train(tmp_path / 'whole')
    for _ in range(5):  # the last step of the 40 is far from these
        alarm = AlarmHook(rng.randint(2, 5), rng.random(), number)
        process = multiprocessing.get_context('fork').Process(target=train, args=(tmp_path / 'work', alarm))
        process.start()
        process.join()
        assert process.exitcode == (GO_ON if number == signal.SIGTERM else -number)
    train(tmp_path / 'work')
    name = f'iter_{5 * EPOCHS}.pth'
    assert_identical(load_trusted(tmp_path / 'work' / name), load_trusted(tmp_path / 'whole' / name))
    assert {path.name for path in (tmp_path / 'work').glob('*iter*')} == {name}
