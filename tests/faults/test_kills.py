"""Real processes, really killed: what is left goes on to the weights of an uninterrupted run, bit by bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest

from helpers import assert_identical, load_trusted
from mmmilan.engine.stopping import GO_ON, StopHook
from mmmilan.engine.work_dir import find_newest, locked
from small_runs import runner

EPOCHS = 6


def train(work_dir: Path) -> None:
    """A whole run of 30 steps that saves after every one of them, or the rest of one."""
    with locked(work_dir):
        newest = find_newest(work_dir)
        start = dict(load_from=str(newest), resume=True) if newest else {}
        loop, checkpoint = dict(type='mmmilan.EpochLoop', max_epochs=EPOCHS), dict(by_epoch=False, max_keep_ckpts=1)
        built = runner(work_dir, length=10, train_cfg=loop, checkpoint=checkpoint, **start)
        built.register_hook(StopHook())
        built.train()


def start(work_dir: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context('fork').Process(target=train, args=(work_dir,))
    process.start()
    return process


@pytest.mark.parametrize('seed', [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_ended_at_any_moment(tmp_path, safe_mmengine, number, seed):
    """Most of the time of this run goes into saving, of which one file is kept."""
    rng = random.Random(seed)
    train(tmp_path / 'whole')
    ended = 0
    for _ in range(5):
        process = start(tmp_path / 'work')
        process.join(rng.uniform(0.1, 0.6))
        if process.exitcode is None:
            os.kill(process.pid, number)
            process.join()
        if process.exitcode == 0:
            break
        # a signal before the first step or after the last is not for the hook
        assert process.exitcode in (-number, GO_ON)
        ended += 1
    else:
        train(tmp_path / 'work')
    assert ended
    name = f'iter_{5 * EPOCHS}.pth'
    assert_identical(load_trusted(tmp_path / 'work' / name), load_trusted(tmp_path / 'whole' / name))
    left = {path.name for path in (tmp_path / 'work').glob('*iter*')}
    assert left - {f'stopped_{name}'} == {name}  # a signal in the very last step leaves its own file
