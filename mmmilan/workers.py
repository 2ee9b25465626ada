"""Data workers of PyTorch's loaders: how many a process may start, and what is said when one is gone."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from mmmilan.errors import InputError
from mmmilan.files import first_line


def default_workers(most: int) -> int:
    """How many data workers a loader has by default: one per core; none in a daemonic process, which can start none."""
    return 0 if multiprocessing.current_process().daemon else min(most, os.cpu_count() or 1)


def check_workers(options: Sequence[str]) -> None:
    """Raise an :class:`InputError` if options ask for data workers in a process that can start none."""
    if options and multiprocessing.current_process().daemon:
        are, them = ('is', 'it') if len(options) == 1 else ('are', 'them')
        raise InputError(
            f'{" and ".join(options)} {are} above 0, but this process is daemonic, as those of Celery are, and can '
            f'start no data workers; set {them} to 0.'
        )


def read_batches(loader: DataLoader, option: str = '') -> Iterator[Any]:
    """Go through the batches of a loader, in a program that may have other processes and loaders.

    PyTorch raises for a worker that died wherever the program is at that moment; here it does where a batch is awaited.

    Args:
        loader: The loader.
        option: What sets its number of workers, for the message; '' if nothing does.

    Raises:
        InputError: a worker died. The others of this loader have been ended then.
    """
    batches = iter(loader)
    if loader.num_workers:
        _remove_worker_pids(id(batches))
        batches._worker_pids_set = False
    try:
        yield from batches
    except Exception as error:
        if not loader.num_workers or not (fault := worker_fault(error)):  # without workers, it is another loader's
            raise
        batches._shutdown_workers()
        remedy = f'lower {option}' if option else 'free some'
        raise InputError(f'{fault}; if memory or /dev/shm ran out, {remedy}.') from error


def worker_fault(error: BaseException) -> str:
    """What PyTorch says of a data worker that died or hangs; '' if an error is another one."""
    if not isinstance(error, (RuntimeError, ConnectionError, EOFError)):
        return ''
    message = first_line(error).rstrip('. ')
    if was_handing_over(error):
        return f'DataLoader worker ended while it handed over a batch ({message})'
    return message if message.startswith('DataLoader ') else ''


def was_handing_over(error: Exception) -> bool:
    """Whether a worker died while its batch was read. PyTorch then raises a bare connection error."""
    names, trace = [], error.__traceback__
    while trace:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return not isinstance(error, RuntimeError) and '_try_get_data' in names
