"""End a run with a clear error when a data worker dies or hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmmilan.errors import InputError
from mmmilan.files import first_line

OF_WORKERS = ('persistent_workers', 'prefetch_factor')  # options that only data workers have
PATIENCE = 600.0  # seconds that a batch may take, where a data loader's config sets no ``timeout``


def guard_workers(runner: Runner) -> None:
    """Limit how long the data loaders of a runner wait for a batch, to ``PATIENCE``.

    Each worker gets a process group of its own: torchrun signals the whole group of a process, and a worker that ends
    at SIGTERM would end the run before its checkpoint is saved.
    """
    build = runner.build_dataloader

    def build_guarded(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        if isinstance(dataloader, dict) and not dataloader.get('num_workers'):
            # PyTorch refuses them without workers, and the recipes set them
            dataloader = {key: value for key, value in dataloader.items() if key not in OF_WORKERS}
        loader = build(dataloader, *args, **kwargs)
        loader.worker_init_fn = partial(init_worker, loader.worker_init_fn)
        if loader.num_workers and not loader.timeout:
            loader.timeout = PATIENCE
        return loader

    runner.build_dataloader = build_guarded


def init_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Move a new data worker into a process group of its own, then call the loader's own ``worker_init_fn``."""
    os.setpgid(0, 0)
    if then:
        then(worker)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn PyTorch's errors about a data worker that died or hangs into an ``InputError``, and end all workers."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise again for the next worker
        message = first_line(error).rstrip('. ')
        if was_handing_over(error):
            message = f'DataLoader worker ended while it handed over a batch ({message})'
        if not message.startswith('DataLoader '):
            raise
        for process in multiprocessing.active_children():
            process.kill()  # a suspended worker ignores SIGTERM, and the exit would wait for it
        if 'timed out' in message:
            remedy = 'look at the disk and at the workers, or raise train_dataloader.timeout'
        else:
            remedy = 'if memory ran out, lower train_dataloader.num_workers'
        raise InputError(f'{message}; {remedy}, and continue with --resume.') from error


def was_handing_over(error: Exception) -> bool:
    """Whether a worker died while its batch was read. PyTorch then raises a bare connection error."""
    names, trace = [], error.__traceback__
    while trace:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return not isinstance(error, RuntimeError) and '_try_get_data' in names
