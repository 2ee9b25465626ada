"""The launcher: its error messages when processes fail, and the signals that it passes on."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from mmmilan import torchrun
from mmmilan.engine.stopping import RESUMABLE
from mmmilan.errors import InputError, exit_on_input_error
from processes import exit_code, exit_codes, fork, free_port, launched_pids

RANK = """
import os, signal, sys, time
from pathlib import Path
from mmmilan.errors import InputError, exit_on_input_error

rank = int(os.environ['LOCAL_RANK'])
with exit_on_input_error():
    if sys.argv[1] == 'input error':
        raise InputError('The key a is wrong; correct it.')
    if sys.argv[1] == 'bug':
        os._exit(7 * rank)
    if sys.argv[1] == 'saves at a signal':
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *args: sys.exit(os.EX_TEMPFAIL))
    Path(f'new_{rank}').write_text(str(os.getpid()))
    Path(f'new_{rank}').rename(f'pid_{rank}')
    time.sleep(600)
"""


def launch(folder: Path, kind: str) -> None:
    """Launch two processes; what they and the launcher print is in ``folder / 'output'``."""
    os.chdir(folder)
    Path('rank.py').write_text(RANK)
    sys.stderr = open('output', 'w', buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    with exit_on_input_error():
        torchrun.main(['--nproc_per_node=2', f'--master_port={free_port()}', 'rank.py', kind])


@pytest.fixture
def launched(tmp_path, request):
    """A launcher, and the pids of its processes by rank, once they run."""
    launcher = fork(launch, tmp_path, request.param)
    with launched_pids(launcher, tmp_path, seconds=60) as pids:
        yield launcher, pids


def test_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ['--nnodes=1', '--nproc_per_node=2', '--master_addr=127.0.0.1', f'--master_port={port}', 'train.py']
        with pytest.raises(InputError) as error:
            torchrun.main(arguments)
    assert str(error.value) == (
        f'The port {port} cannot be used (Address already in use); choose another one: PORT={port + 1} bash ...'
    )


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('input error', 'error: The key a is wrong; correct it.'),
        ('bug', 'error: process 1 ended with status 7; its own output says why.'),
    ],
)
def test_processes_that_fail(kind, expected, tmp_path):
    """The output ends with one sentence for all processes."""
    assert exit_code(launch, tmp_path, kind) == 1
    output = (tmp_path / 'output').read_text()
    assert output.splitlines()[-1] == expected
    assert 'Traceback' not in output and output.count('error:') == 1, output


@pytest.mark.parametrize('launched', ['saves at a signal'], indirect=True)
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_passed_on(launched, tmp_path, number):
    """The launcher exits with the status of processes that have saved."""
    launcher, _ = launched
    os.kill(launcher.pid, number)
    assert exit_codes([launcher], 60) == [RESUMABLE]
    assert 'Traceback' not in (tmp_path / 'output').read_text()


def test_signals_mean_afterwards_what_they_meant_before(tmp_path):
    """As while ``finetune --gpus`` validates the model that the processes trained."""
    assert exit_code(end_of_a_launch, tmp_path) == 0, (tmp_path / 'output').read_text()


def end_of_a_launch(folder: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
    with exit_on_input_error():  # as a command
        before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit):
        launch(folder, 'bug')
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize('launched', ['ends at a signal', 'saves at a signal'], indirect=True)
def test_a_killed_process_is_named(launched, tmp_path):
    launcher, pids = launched
    os.kill(pids[1], signal.SIGKILL)
    assert exit_codes([launcher], 60) == [1]
    output = (tmp_path / 'output').read_text()
    assert output.splitlines()[-1] == 'error: process 1 ended with SIGKILL; its own output says why.'
    assert 'Traceback' not in output
