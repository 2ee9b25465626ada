"""A run in a program of the user, such as a notebook: what it changes of the process, and gives back."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from mmengine.dist import is_distributed
from mmengine.runner import Runner

from mmmilan.errors import InputError, set_handlers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a scheduler's end, Ctrl-C, Slurm's warning (--signal=USR1)
TRAINING = threading.Lock()  # held while a training runs


@contextmanager
def only_training() -> Iterator[None]:
    """A context of a training, of which a process has one at a time: the random numbers of its steps are the process's.

    Raises:
        InputError: another one runs.
    """
    if not TRAINING.acquire(blocking=False):
        raise InputError(
            'Another training runs in this process; wait for its end, or start this one in a process of its own.'
        )
    try:
        yield
    finally:
        TRAINING.release()


@contextmanager
def program_kept() -> Iterator[None]:
    """A context of a run, after which random numbers and settings of the process are as before.

    After an error, the handlers of signals are, too. A launcher's process keeps those of the run: it may be told to
    stop while it reports its error.
    """
    np.random.random()  # the next run without a seed has another one
    states, handlers = (random.getstate(), np.random.get_state()), {each: signal.getsignal(each) for each in SIGNALS}
    threads, method = cv2.getNumThreads(), multiprocessing.get_start_method(allow_none=True)
    benchmark, methods = torch.backends.cudnn.benchmark, (Runner.dump_config, Runner.setup_env)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # none is claimed for this
    try:
        with torch.random.fork_rng(devices):
            yield
    except Exception:
        if not is_distributed():
            set_handlers(handlers)
        raise
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        cv2.setNumThreads(threads)
        multiprocessing.set_start_method(method, force=True)
        torch.backends.cudnn.benchmark = benchmark
        Runner.dump_config, Runner.setup_env = methods
