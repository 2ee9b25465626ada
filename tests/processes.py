"""What tests start: shell scripts of tools/, forks, ranks of a distributed run, HTTP servers."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Process
from pathlib import Path

import torch.distributed as dist

from helpers import ROOT
from mmmilan.engine.distributed import end_processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def run_script(script: str, *args: object) -> str:
    """Run a shell script of tools/, which must succeed. Returns what it printed."""
    environment = os.environ | dict(OMP_NUM_THREADS='1', PORT=str(free_port()))
    environment['PATH'] = f'{Path(sys.executable).parent}:{environment["PATH"]}'
    command = ['bash', ROOT / 'tools' / script, *map(str, args)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fork(target: Callable, *args: object, **kwargs: object) -> Process:
    """Call ``target`` in a fork of this process, which has everything imported already."""
    process = multiprocessing.get_context('fork').Process(target=target, args=args, kwargs=kwargs)
    process.start()
    return process


def start_ranks(target: Callable, *args: object, processes: int = 2, launcher: bool = True) -> list[Process]:
    """Fork this process into ranks that call ``target(*args)``, each with the environment of its rank.

    The ranks meet at a store of this process, as under torchrun; with ``launcher=False`` at a store of rank 0, as under
    Slurm.
    """
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not launcher:
        del store
    ranks = []
    for rank in range(processes):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        environment['TORCHELASTIC_USE_AGENT_STORE'] = launcher
        process = fork(_be_rank, environment, target, args)
        process.store = store if launcher else None  # kept alive as long as the rank
        ranks.append(process)
    return ranks


def _be_rank(environment: dict[str, object], target: Callable, args: tuple) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    target(*args)


def exit_codes(processes: list[Process], seconds: float = 240) -> list[int | None]:
    """Wait for processes to end; the exit code is None for one that had to be killed after some seconds."""
    deadline = time.monotonic() + seconds
    try:
        while None in (codes := [process.exitcode for process in processes]) and time.monotonic() < deadline:
            time.sleep(0.01)  # join(seconds) would wait for data workers of a killed process too
        return codes
    finally:
        for process in processes:
            process.kill()


def exit_code(target: Callable, *args: object, seconds: float = 240, **kwargs: object) -> int | None:
    """Wait for a fork of this process that calls ``target``, see :func:`exit_codes`."""
    return exit_codes([fork(target, *args, **kwargs)], seconds)[0]


@contextmanager
def launched_pids(launcher: Process | subprocess.Popen, folder: Path, seconds: float) -> Iterator[list[int]]:
    """The pids that two launched processes write to ``folder / 'pid_0'`` and ``'pid_1'``, once both are there.

    At the end all three processes are killed. If a file does not come, the error shows ``folder / 'output'``.
    """
    files = [folder / 'pid_0', folder / 'pid_1']
    pids = []
    deadline = time.monotonic() + seconds
    try:
        while not all(file.exists() for file in files):
            ended = os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert not ended and time.monotonic() < deadline, (folder / 'output').read_text()
            time.sleep(0.02)
        pids = [int(file.read_text()) for file in files]
        yield pids
    finally:
        for pid in (launcher.pid, *pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run_group(step: Callable, *args: object) -> None:
    """Two ranks call ``step(*args)`` in a gloo process group; both must succeed."""
    assert exit_codes(start_ranks(_in_group, step, args)) == [0, 0]


def _in_group(step: Callable, args: tuple) -> None:
    dist.init_process_group('gloo')
    step(*args)
    end_processes()


def run_script_on_ranks(script: str, processes: int, *args: object) -> None:
    """Run a script of tools/ on several ranks; all must succeed."""
    ranks = start_ranks(_be_script, script, args, processes=processes)
    assert exit_codes(ranks) == [0] * processes


def _be_script(script: str, args: tuple) -> None:
    sys.argv = [script, *map(str, args), '--launcher', 'pytorch']
    runpy.run_path(str(ROOT / 'tools' / script), run_name='__main__')


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        pass  # connections that a test ended


@contextmanager
def serve_http(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[Server]:
    """Run an HTTP server on a free port of 127.0.0.1; its address is ``server.url``."""
    server = Server(('127.0.0.1', 0), handler)
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def run_python(code: str, *args: str) -> list[str]:
    """What a program in Python prints, line by line."""
    result = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
