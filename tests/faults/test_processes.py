"""A process or a data worker that dies, hangs or sleeps: the others end in time and name it."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from mmengine.dist import get_rank
from mmengine.hooks import Hook

from helpers import rest_slow
from mmmilan.engine import data_checks, stopping
from mmmilan.engine.data_checks import guard_workers, worker_errors
from mmmilan.engine.stopping import RESUMABLE, HeartbeatHook, StopHook
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.files import write_text
from processes import exit_code, exit_codes, fork, free_port, launched_pids
from small_runs import runner, start_run

LOOP = dict(type='mmmilan.EpochLoop', max_epochs=3)
LIMIT = 1.2  # seconds, of HeartbeatHook


class FaultHook(Hook):
    """Fail in or before iteration 5, in a way that ``fault`` names."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.fault == 'sleep in the forward pass' and runner.iter == 4:
            time.sleep(600)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter != 3:
            return
        if self.fault == 'sleep before it':
            time.sleep(600)
        if self.fault == 'error':
            raise InputError('a.jpg does not decode; replace it.')
        if self.fault == 'bug':
            raise KeyError('a bug')
        for name in ('SIGKILL', 'SIGSTOP'):
            if self.fault == name:
                os.kill(os.getpid(), getattr(signal, name))


def train(work_dir: Path, fault: str, at: int, **kwargs) -> None:
    """Train on a rank; rank ``at`` fails."""
    sys.stderr = open(work_dir / f'output_{get_rank()}', 'w', buffering=1)  # noqa: SIM115
    built = runner(work_dir, length=100, train_cfg=dict(LOOP), **kwargs)
    heartbeat = HeartbeatHook(silent=LIMIT, stuck=LIMIT)
    for hook in (heartbeat, StopHook(), *([FaultHook(fault)] if get_rank() == at else [])):
        built.register_hook(hook)
    with exit_on_input_error(), heartbeat.publish_error():
        built.train()


FAULTS = {
    'SIGKILL': 'has not answered for 1.2 s, last seen before iteration ',
    'SIGSTOP': 'has not answered for 1.2 s, last seen before iteration ',
    'sleep before it': 'is behind, before iteration 5;',
    'sleep in the forward pass': 'is behind, in the forward pass of iteration 5;',
    'error': 'ended before iteration 5: a.jpg does not decode; replace it.;',
    'bug': "ended before iteration 5: 'a bug';",
}


def outcome(ranks: list[multiprocessing.Process], other: int, work_dir: Path) -> str:
    """The error message of the other rank, which ends within a few times the limit."""
    begin = time.monotonic()
    ranks[other].join(30)
    seconds, codes = time.monotonic() - begin, exit_codes(ranks, 0)
    assert codes[other] == 1 and seconds < 20
    (line,) = [line for line in (work_dir / f'output_{other}').read_text().splitlines() if line.startswith('error: ')]
    assert line.endswith('and continue with --resume.')
    return line


@pytest.mark.parametrize('fault', rest_slow(FAULTS, 'SIGKILL'))
@pytest.mark.parametrize('at', rest_slow([0, 1], 1))
def test_the_other_process_says_which(tmp_path, safe_mmengine, fault, at):
    ranks = start_run(train, tmp_path, fault, at)
    line = outcome(ranks, 1 - at, tmp_path)
    assert f'rocess {at} (process {ranks[at].pid} on ' in line and FAULTS[fault] in line


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['SIGKILL', 'SIGSTOP'])
def test_the_process_that_has_the_store(tmp_path, safe_mmengine, fault):
    """Without a launcher the store dies with process 0, and with it all that the processes reported."""
    ranks = start_run(train, tmp_path, fault, 0, launcher=False)
    assert outcome(ranks, 1, tmp_path).startswith('error: Process 0')


def be_command() -> None:
    """In this fork, be a command, which ends when its training is stuck, and not a program of the user."""
    stopping.is_command = lambda: True


class SlowHook(Hook):
    def after_train_epoch(self, runner):
        time.sleep(1.5 * LIMIT)


def train_with_pauses(work_dir: Path) -> None:
    be_command()
    built = runner(work_dir, length=10, train_cfg=dict(LOOP, max_epochs=2))
    heartbeat = HeartbeatHook(silent=LIMIT, stuck=LIMIT)
    for hook in (heartbeat, SlowHook()):
        built.register_hook(hook)
    with heartbeat.publish_error():
        built.train()


@pytest.mark.slow
def test_hooks_between_epochs_take_their_time(tmp_path, safe_mmengine):
    """A slow hook, such as an evaluation, is no fault."""
    assert exit_code(train_with_pauses, tmp_path) == 0


class CompiledHook(Hook):
    """A first step that takes its time, and a second one that takes it too."""

    def __init__(self, compiled: bool, slow: int) -> None:
        self.compiled, self.slow = compiled, slow

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        time.sleep(1.5 * LIMIT if runner.iter == self.slow else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('command', 'compiled', 'slow', 'fault'),
    [(True, True, 0, False), (True, False, 0, True), (True, True, 1, True), (False, False, 0, False)],
)
def test_a_compilation_takes_its_time(tmp_path, safe_mmengine, command, compiled, slow, fault):
    """In the first step of a compiled model no progress is no fault, nor in a program that someone may debug."""

    def train_slowly(work_dir: Path) -> None:
        if command:
            be_command()
        sys.stderr = open(work_dir / 'output', 'w', buffering=1)  # noqa: SIM115
        built = runner(work_dir, length=10, train_cfg=dict(LOOP, max_epochs=1))
        heartbeat = HeartbeatHook(silent=LIMIT, stuck=LIMIT)
        for hook in (heartbeat, CompiledHook(compiled, slow)):
            built.register_hook(hook)
        with heartbeat.publish_error():
            built.train()

    assert (exit_code(train_slowly, tmp_path) == 1) == fault


class RaisingHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        raise ValueError('no')


def fail_and_go_on(work_dir: Path, guarded: bool) -> None:
    heartbeat = HeartbeatHook(silent=LIMIT, stuck=LIMIT)
    built = runner(work_dir, length=10, train_cfg=dict(LOOP, max_epochs=1))
    for hook in (heartbeat, RaisingHook()):
        built.register_hook(hook)
    with pytest.raises(ValueError, match='no'), heartbeat.publish_error() if guarded else nullcontext():
        built.train()
    time.sleep(3 * LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize('guarded', [True, False])
def test_a_program_goes_on_after_a_training_that_failed(tmp_path, safe_mmengine, guarded):
    assert exit_code(fail_and_go_on, tmp_path, guarded) == 0


# -- data workers


class WorkerHook(Hook):
    """Send all data workers a signal after the second step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 1:
            for process in multiprocessing.active_children():
                os.kill(process.pid, self.number)


def train_with_workers(work_dir: Path, number: int) -> None:
    be_command()
    sys.stderr = open(work_dir / 'output', 'w', buffering=1)  # noqa: SIM115
    data_checks.PATIENCE = LIMIT
    built = runner(work_dir, length=400, train_cfg=dict(LOOP), num_workers=2)
    guard_workers(built)
    heartbeat = HeartbeatHook(silent=LIMIT, stuck=4 * LIMIT)
    for hook in (heartbeat, WorkerHook(number)):
        built.register_hook(hook)
    with exit_on_input_error(), heartbeat.publish_error(), worker_errors():
        built.train()


@pytest.mark.parametrize(
    'number, message',
    [
        (signal.SIGKILL, 'error: DataLoader worker'),
        (signal.SIGTERM, 'error: DataLoader worker'),
        pytest.param(
            signal.SIGSTOP,
            f'error: (DataLoader timed out|Training made no progress for {4 * LIMIT:g} s before iteration)',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_data_worker_that_is_gone(tmp_path, safe_mmengine, number, message):
    assert exit_code(train_with_workers, tmp_path, number, seconds=30) == 1
    (line,) = [line for line in (tmp_path / 'output').read_text().splitlines() if line.startswith('error: ')]
    assert re.match(message, line) and line.endswith('continue with --resume.')


@pytest.mark.parametrize('error', [RuntimeError('DataLoader worker is killed'), KeyError('a bug'), SystemExit(75)])
def test_any_error_ends_the_workers_and_no_other_process(error):
    """Also a worker that starts: SIGTERM would be lost on it, and the exit of the program would wait for it."""
    before, handler = fork(time.sleep, 60), signal.signal(signal.SIGCHLD, lambda *args: None)
    try:
        own = signal.getsignal(signal.SIGCHLD)
        with pytest.raises((InputError, KeyError, SystemExit)), worker_errors():
            worker = fork(time.sleep, 60)
            raise error
        assert worker.exitcode == -signal.SIGKILL and before.is_alive()
        assert signal.getsignal(signal.SIGCHLD) is own
    finally:
        signal.signal(signal.SIGCHLD, handler)
        before.kill()


def test_a_connection_error_is_a_workers_only_while_a_batch_is_read():
    def _try_get_data():  # as PyTorch's data loader calls it
        raise ConnectionResetError(104, 'Connection reset by peer')

    message = '^DataLoader worker ended while it handed over a batch .*reset by peer'
    with pytest.raises(InputError, match=message), worker_errors():
        _try_get_data()
    with pytest.raises(ConnectionResetError), worker_errors():
        raise ConnectionResetError(104, 'Connection reset by peer')


class ExitHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        sys.exit(RESUMABLE)


def train_and_exit_slowly(work_dir: Path) -> None:
    be_command()
    built = runner(work_dir, length=100, train_cfg=dict(LOOP))
    heartbeat = HeartbeatHook(silent=LIMIT, stuck=10 * LIMIT)
    for hook in (heartbeat, ExitHook()):
        built.register_hook(hook)
    threading.Thread(target=time.sleep, args=(LIMIT,)).start()  # the interpreter waits for it when it shuts down
    with heartbeat.publish_error():
        built.train()


@pytest.mark.slow
def test_a_slow_exit_keeps_its_status(tmp_path, safe_mmengine):
    """The thread of the heartbeat does not take the shutdown of the interpreter for a fault."""
    assert exit_code(train_and_exit_slowly, tmp_path, seconds=30) == RESUMABLE


class GroupHook(Hook):
    """Send a signal to the group of this process, as torchrun and a terminal do."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 6:
            subprocess.run(['kill', '-TERM', '--', f'-{os.getpgid(0)}'], check=True, start_new_session=True)
            time.sleep(0.5)  # workers in the group would get it by now


def train_in_a_group(work_dir: Path) -> None:
    os.setpgid(0, 0)
    built = runner(work_dir, length=100, train_cfg=dict(LOOP), num_workers=2)
    guard_workers(built)
    for hook in (GroupHook(), StopHook()):
        built.register_hook(hook)
    with worker_errors():
        built.train()


@pytest.mark.slow
def test_a_signal_to_the_group_leaves_the_workers_alone(tmp_path, safe_mmengine):
    assert exit_code(train_in_a_group, tmp_path) == RESUMABLE
    assert (tmp_path / 'stopped_iter_7.pth').exists()


# -- the launcher

RANK = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {faults!r}]
from test_processes import LaunchedHook, runner
from mmengine.config import Config
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.engine.distributed import init_processes
from mmmilan.engine.stopping import HeartbeatHook
from mmmilan.engine.stopping import StopHook
from mmmilan.errors import InputError, exit_on_input_error

use_safe_loading()
cfg = Config(dict(launcher='pytorch'))
init_processes(cfg)
loop = dict(type='mmmilan.EpochLoop', max_epochs=1)
built = runner(Path('work'), length=10**6, train_cfg=loop, launcher='pytorch', cfg=cfg)
heartbeat = HeartbeatHook(silent=10.0, stuck=20.0)  # on a busy machine, too
for hook in (heartbeat, LaunchedHook(), StopHook()):
    built.register_hook(hook)
with exit_on_input_error(), heartbeat.publish_error():
    built.train()
"""


class LaunchedHook(Hook):
    """Write the pid of this process to a file once it trains."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 3:
            write_text(Path(f'pid_{get_rank()}'), str(os.getpid()))


@pytest.fixture
def launched(tmp_path):
    """A launcher with two processes that train, and their pids by rank."""
    folder = Path(__file__).parent
    (tmp_path / 'train.py').write_text(RANK.format(tests=str(folder.parent), faults=str(folder)))
    launch = [sys.executable, '-m', 'mmmilan.torchrun', '--nproc_per_node=2', f'--master_port={free_port()}']
    environment = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(folder.parent.parent))
    with (tmp_path / 'output').open('w') as output:
        launcher = subprocess.Popen([*launch, 'train.py'], cwd=tmp_path, env=environment, stderr=output)
    with launched_pids(launcher, tmp_path, seconds=240) as pids:
        yield launcher, pids


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher(launched, tmp_path, number):
    """As a scheduler sends it: the run saves, and the launcher exits with the status of a run to resume."""
    launcher, _ = launched
    launcher.send_signal(number)
    status, output = launcher.wait(timeout=60), (tmp_path / 'output').read_text()
    assert status == RESUMABLE, output
    assert len(list(tmp_path.glob('work/stopped_iter_*.pth'))) == 1
    assert 'Traceback' not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    'number, message',
    [
        (signal.SIGKILL, 'error: process 1 ended with SIGKILL; its own output says why.'),
        (signal.SIGSTOP, r'error: Process 1 \(process \d+ on .*\) has not answered'),
    ],
)
def test_a_launched_process_that_is_gone(launched, tmp_path, number, message):
    """The last line names it, and there is no traceback."""
    launcher, pids = launched
    os.kill(pids[1], number)
    status, output = launcher.wait(timeout=90), (tmp_path / 'output').read_text()
    assert status == 1, output
    assert re.match(message, output.splitlines()[-1])
    assert 'Traceback' not in output, output
