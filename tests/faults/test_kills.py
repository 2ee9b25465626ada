"""Real processes, really killed: what is left goes on to the weights of an uninterrupted run, bit by bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, assert_identical, load_trusted
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
    assert [path.name for path in (tmp_path / 'work').glob('*iter*')] == [name]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes(tiny_config, tmp_path):
    """Both stop after the same step, and both go on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(OMP_NUM_THREADS='1', PORT=str(port), PYTHONPATH=str(ROOT))
    environment['PATH'] = f'{Path(sys.executable).parent}:{environment["PATH"]}'
    config = tiny_config({'train_dataloader.batch_size': 2})

    def launch(*options: object) -> subprocess.Popen:
        command = ['bash', ROOT / 'tools/dist_train.sh', config, '2', *map(str, options)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = launch('--work-dir', tmp_path / 'whole').communicate()[0]
    assert (tmp_path / 'whole/epoch_2.pth').is_file(), whole
    first = launch('--work-dir', tmp_path / 'work')
    log: Path | None = None
    while log is None or 'Epoch(train)' not in log.read_text():
        time.sleep(0.05)
        assert first.poll() is None
        log = next((tmp_path / 'work').glob('*/*.log'), None)
    children = Path(f'/proc/{first.pid}/task/{first.pid}/children').read_text().split()
    os.kill(int(children[1]), signal.SIGUSR1)
    said = first.communicate()[0]
    assert 'SIGUSR1: stopped after iteration' in said
    newest = find_newest(tmp_path / 'work')
    assert newest.name.startswith('stopped_iter_')
    rest = launch('--work-dir', tmp_path / 'work', '--resume').communicate()[0]
    assert (tmp_path / 'work/epoch_2.pth').is_file(), rest
    assert_identical(load_trusted(tmp_path / 'work/epoch_2.pth'), load_trusted(tmp_path / 'whole/epoch_2.pth'))
