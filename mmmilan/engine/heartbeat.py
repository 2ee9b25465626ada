"""Processes that hear of each other: where one dies or hangs, the others say which one, and end.

Of PyTorch's own means, NCCL's watchdog ends a process ten minutes after a collective began and does not know whom it
waited for, gloo notices a process that is dead and none that hangs, and ``monitored_barrier`` names the missing process
but would be a wait of its own in each step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from mmengine.dist import barrier, get_rank, get_world_size, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmmilan.errors import send_to_torchrun
from mmmilan.files import first_line
from mmmilan.registry import HOOKS

# A process is before an iteration while it loads its batch, saves and logs.
PLACES = ('before', 'in the forward pass of', 'in the backward pass of')


class State(NamedTuple):
    """What a process tells the others."""

    name: str
    beat: int  # how often it was told
    marks: int  # three for each iteration, see PLACES
    ended: str  # the error that ends the process
    done: bool  # whether it has finished training

    @property
    def place(self) -> str:
        return f'{PLACES[self.marks % 3]} iteration {self.marks // 3 + 1}'


@HOOKS.register_module()
class HeartbeatHook(Hook):
    """End this process, with a sentence that names the one at fault, when another is gone or nothing goes on.

    A thread tells the others how far this process is, through the store at which they all met, and hears how far they
    are. Alone, a process notices that it makes no step, as when a data worker was stopped. While it evaluates, and
    while hooks work between epochs, only processes that are gone are noticed.

    Args:
        silent: Seconds after which a process that is not heard of is taken to be gone.
        stuck: Seconds without progress after which all end; the process that is furthest behind is named. NCCL's own
            limit is 600.
    """

    priority = 'VERY_HIGH'

    def __init__(self, silent: float = 60.0, stuck: float = 540.0) -> None:
        self.silent, self.stuck = silent, stuck
        self.moved: float | None = None  # when the last mark was made; None while none is due
        self.store: dist.Store | None = None
        self.finished = threading.Event()

    # -- what training does

    def before_train(self, runner: Runner) -> None:
        self.state = State(f'process {os.getpid()} on {socket.gethostname()}', 0, 3 * runner.iter, '', False)
        if is_distributed():
            address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self.silent))
            self.store = dist.PrefixStore('mmmilan/heartbeat', store)
            self.tell()
            barrier()  # all have told
        runner.model.register_forward_hook(self.after_forward)
        self.thread = threading.Thread(target=self.watch, name='heartbeat', daemon=True)
        self.thread.start()

    def mark(self, marks: int) -> None:
        self.state, self.moved = self.state._replace(marks=marks), time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self.mark(3 * runner.iter + 1)

    def after_forward(self, module: nn.Module, *args: object) -> None:
        if module.training and self.state.marks % 3 == 1:
            self.mark(self.state.marks + 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        self.mark(3 * (runner.iter + 1))

    def after_train_epoch(self, runner: Runner) -> None:
        self.moved = None  # other hooks may evaluate now

    def before_train_epoch(self, runner: Runner) -> None:
        self.moved = time.monotonic()

    def before_val_epoch(self, runner: Runner) -> None:
        self.moved = None

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.moved = time.monotonic()

    def after_train(self, runner: Runner) -> None:
        self.finished.set()
        self.thread.join()
        self.tell(done=True)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others of an exception in this context. One of a lost connection says only that another is gone.

        Then it is waited for the thread to find out which; a launcher that knows it already may end this process.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, dist.DistError) or 'gloo' in str(error):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(2 * self.silent if self.store else 0)
            self.tell(ended=first_line(error))
            raise

    # -- what the thread does

    def tell(self, **changes: Any) -> None:
        if self.store:
            self.state = self.state._replace(beat=self.state.beat + 1, **changes)
            self.store.set(str(get_rank()), json.dumps(self.state))

    def exchange(self) -> dict[int, State]:
        """Tell the others of this process; what each has told last, by its rank."""
        if not self.store:
            return {0: self.state}
        self.tell()
        told = self.store.multi_get([str(rank) for rank in range(get_world_size())])
        return {rank: State(*json.loads(text)) for rank, text in enumerate(told)}

    def watch(self) -> None:
        heard: dict[int, tuple[State, float]] = {}
        before = time.monotonic()
        with ThreadPoolExecutor(max_workers=1) as executor:
            while not self.finished.wait(self.silent / 6):
                try:
                    states = executor.submit(self.exchange).result(timeout=self.silent)
                except (RuntimeError, FutureTimeoutError):  # the first is the store's
                    self.end('Process 0, or the launcher of the processes, does not answer')
                now = time.monotonic()
                if now - before > self.silent / 2:  # this process itself was stopped
                    heard, self.moved = {}, self.moved and now
                for rank, state in states.items():
                    if rank not in heard or heard[rank][0] != state:
                        heard[rank] = state, now
                fault = self.fault(heard, now)
                if fault:
                    self.end(fault)
                before = now

    def fault(self, heard: dict[int, tuple[State, float]], now: float) -> str:
        """What is wrong with which process, '' if nothing is.

        Args:
            heard: What each process told last, and when that was heard first.
            now: The time.
        """
        for rank, (state, when) in heard.items():
            if state.ended:
                return f'Process {rank} ({state.name}) ended {state.place}: {state.ended}'
            if self.store and not state.done and now - when > self.silent:
                return f'Process {rank} ({state.name}) was not heard of for {self.silent:g} s, last {state.place}'
        if self.moved is None or now - self.moved <= self.stuck:
            return ''
        states = [state for state, _ in heard.values()]
        last = min(states, key=lambda state: state.marks)
        if all(state.marks == last.marks for state in states):
            return f'Nothing went on for {self.stuck:g} s {last.place}'
        rank = states.index(last)
        return f'Nothing went on for {self.stuck:g} s: process {rank} ({last.name}) is behind, {last.place}'

    def end(self, fault: str) -> None:
        """End the process from this thread, as the main one may wait for ever."""
        for process in multiprocessing.active_children():  # a data worker that was stopped would stay
            process.kill()
        message = f'error: {fault}; look at the output and the machine of that process, and go on by --resume.'
        if not send_to_torchrun(message):
            print(message, file=sys.stderr, flush=True)
        os._exit(1)
