"""Ends of a run: told to stop, or because a process died or hangs; the status says whether it can be resumed.

For the second, PyTorch's own means are not enough: NCCL's watchdog ends a process ten minutes after a collective began,
but does not know which process was missing. gloo notices dead processes, but not hanging ones. ``monitored_barrier``
names the missing process, but adds a synchronization to each step.
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
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from mmengine.dist import barrier, get_rank, get_world_size, is_distributed
from mmengine.hooks import EarlyStoppingHook as MMEngineEarlyStoppingHook
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmmilan.engine.checkpointing import CheckpointHook
from mmmilan.engine.program import SIGNALS
from mmmilan.errors import is_command, send_to_torchrun, set_handlers, warn
from mmmilan.files import first_line
from mmmilan.registry import HOOKS

# Exit status of a stopped run that can be resumed (EX_TEMPFAIL of sysexits.h: "try again later").
RESUMABLE = os.EX_TEMPFAIL


@HOOKS.register_module()
class StopHook(Hook):
    """On SIGTERM, SIGINT or SIGUSR1: finish the step, save a checkpoint, exit with status ``RESUMABLE``.

    All processes stop after the same step, whichever of them got the signal: the signal is all-reduced asynchronously
    after every step and read after the next one, so no step waits for it. A second SIGINT stops at once. While
    gradients are accumulated, the run goes on until the optimizer's next step. After the last step the run ends as
    always.

    ``--resume`` then continues bit-identically.
    """

    priority = 'LOWEST'  # after a checkpoint that was due anyway

    def __init__(self) -> None:
        self.received: int | None = None
        self.answer: tuple[dist.Work, torch.Tensor] | None = None

    def before_train(self, runner: Runner) -> None:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        set_handlers(dict.fromkeys(SIGNALS, self.receive))
        # on the CPU, where nothing waits for a GPU
        self.group = dist.new_group(backend='gloo') if is_distributed() else None

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            self.restore()
            os.kill(os.getpid(), number)
        self.received = number

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if runner.iter + 1 >= runner.max_iters:
            return
        number = self.shared_signal()
        if not number or not runner.optim_wrapper.should_update():
            return
        hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        saved = hook.save_now(runner) if hook else 'nothing (there is no mmmilan.CheckpointHook)'
        warn(
            f'{signal.Signals(number).name}: stopped after iteration {runner.iter + 1}, saved {saved}; continue '
            f'with --resume (exit status {RESUMABLE}).'
        )
        if self.group:
            dist.barrier(self.group)  # the main process has written
        else:  # with several processes, the first exit makes the launcher send SIGTERM to the others: keep the handlers
            self.restore()
        sys.exit(RESUMABLE)

    def shared_signal(self) -> int:
        """The signal that any process had received one step ago; 0 for none."""
        if self.group is None:
            return self.received or 0
        answer = 0
        if self.answer:
            self.answer[0].wait()
            answer = int(self.answer[1])
        flag = torch.tensor(self.received or 0)
        self.answer = dist.all_reduce(flag, dist.ReduceOp.MAX, self.group, async_op=True), flag
        return answer

    def after_train(self, runner: Runner) -> None:
        if self.answer:
            self.answer[0].wait()
        self.restore()

    def restore(self) -> None:
        """Restore the signal handlers."""
        set_handlers(self.before)


@HOOKS.register_module()
class EarlyStoppingHook(MMEngineEarlyStoppingHook):
    """MMEngine's ``EarlyStoppingHook``, which a resumed run continues: it waits as long as an uninterrupted one.

    Its state is in the checkpoints, with MMEngine's messages. Same arguments.
    """

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        hub = runner.message_hub
        self.best_score, self.wait_count = hub.get_info('early_stopping', (self.best_score, self.wait_count))
        super().after_val_epoch(runner, metrics)
        hub.update_info('early_stopping', (self.best_score, self.wait_count))


# A process is before an iteration while it loads its batch, saves and logs.
PLACES = ('before', 'in the forward pass of', 'in the backward pass of')


class State(NamedTuple):
    """What a process publishes about itself."""

    name: str
    beat: int  # counts the updates
    marks: int  # three for each iteration, see PLACES
    error: str  # the error that ends the process, '' for none
    done: bool  # whether it has finished training

    @property
    def place(self) -> str:
        return f'{PLACES[self.marks % 3]} iteration {self.marks // 3 + 1}'


@HOOKS.register_module()
class HeartbeatHook(Hook):
    """End this process when another one is gone or training makes no progress, and name the process at fault.

    A thread publishes the progress of this process in the store of the process group and reads the others' progress.
    A command that trains alone notices when it makes no step, as when a data worker hangs. During evaluation, while
    hooks work between epochs, and while the first step compiles, only processes that are gone are noticed.

    Args:
        silent: Seconds without an update after which a process counts as gone.
        stuck: Seconds without progress after which all processes end; the one furthest behind is named. NCCL's own
            limit is 600.
    """

    priority = 'VERY_HIGH'

    def __init__(self, silent: float = 60.0, stuck: float = 540.0) -> None:
        self.silent, self.stuck = silent, stuck
        self.moved: float | None = None  # time of the last progress; None while none is expected
        self.compiling: bool | None = None  # whether this step compiles; None before the first step
        self.store: dist.Store | None = None
        self.guarding = False  # in a command, within publish_error
        self.finished = threading.Event()

    # -- what training does

    def before_train(self, runner: Runner) -> None:
        self.state = State(f'process {os.getpid()} on {socket.gethostname()}', 0, 3 * runner.iter, '', False)
        if is_distributed():
            address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self.silent))
            self.store = dist.PrefixStore('mmmilan/heartbeat', store)
            self.publish()
            barrier()  # all have published
        elif not self.guarding:  # a program of the user, which goes on when training fails
            self.finished.set()
        runner.model.register_forward_hook(self.after_forward)
        self.thread = threading.Thread(target=self.watch, name='heartbeat', daemon=True)
        self.thread.start()

    def mark(self, marks: int) -> None:
        self.state, self.moved = self.state._replace(marks=marks), None if self.compiling else time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.compiling is None:  # of the first step, before which CompileHook has done its part
            self.compiling = any(getattr(hook, 'compiled', False) for hook in runner.hooks)
        self.mark(3 * runner.iter + 1)

    def after_forward(self, module: nn.Module, *args: object) -> None:
        if module.training and self.state.marks % 3 == 1:
            self.mark(self.state.marks + 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        self.compiling = False
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
        self.publish(done=True)

    @contextmanager
    def publish_error(self) -> Iterator[None]:
        """Publish an exception of this context, within which a command that trains alone is watched, too.

        A lost connection only says that some process is gone. The main thread then waits until the heartbeat's thread
        has found out which one, or until the launcher ends this process.
        """
        self.guarding = is_command()
        try:
            yield
        except Exception as error:
            if isinstance(error, dist.DistError) or 'gloo' in str(error):
                set_handlers({signal.SIGTERM: signal.SIG_DFL})
                time.sleep(2 * self.silent if self.store else 0)
            self.publish(error=first_line(error))
            raise
        finally:
            self.finished.set()

    # -- what the thread does

    def publish(self, **changes: Any) -> None:
        """Update the state of this process in the store."""
        if self.store:
            self.state = self.state._replace(beat=self.state.beat + 1, **changes)
            self.store.set(str(get_rank()), json.dumps(self.state))

    def exchange(self) -> dict[int, State]:
        """Publish the state of this process; return the last state of each process by its rank."""
        if not self.store:
            return {0: self.state}
        self.publish()
        states = self.store.multi_get([str(rank) for rank in range(get_world_size())])
        return {rank: State(*json.loads(text)) for rank, text in enumerate(states)}

    def watch(self) -> None:
        """The thread's loop: exchange states, and end the process at the first fault."""
        seen: dict[int, tuple[State, float]] = {}
        before = time.monotonic()
        with ThreadPoolExecutor(max_workers=1) as executor:
            while not self.finished.wait(self.silent / 6):
                try:
                    future = executor.submit(self.exchange)
                except RuntimeError:  # the interpreter is shutting down
                    return
                try:
                    states = future.result(timeout=self.silent)
                except (RuntimeError, FutureTimeoutError):  # the first is the store's
                    self.end('Process 0, or the launcher of the processes, does not answer')
                now = time.monotonic()
                if now - before > self.silent / 2:  # this process itself was stopped
                    seen, self.moved = {}, self.moved and now
                for rank, state in states.items():
                    if rank not in seen or seen[rank][0] != state:
                        seen[rank] = state, now
                fault = self.fault(seen, now)
                if fault:
                    self.end(fault)
                before = now

    def fault(self, seen: dict[int, tuple[State, float]], now: float) -> str:
        """The process at fault and its fault; '' if all is well.

        Args:
            seen: The last state of each process, and when it was first seen.
            now: The time.
        """
        for rank, (state, when) in seen.items():
            if state.error:
                return f'Process {rank} ({state.name}) ended {state.place}: {state.error}'
            if self.store and not state.done and now - when > self.silent:
                return f'Process {rank} ({state.name}) has not answered for {self.silent:g} s, last seen {state.place}'
        if self.moved is None or now - self.moved <= self.stuck:
            return ''
        states = [state for state, _ in seen.values()]
        last = min(states, key=lambda state: state.marks)
        if all(state.marks == last.marks for state in states):
            return f'Training made no progress for {self.stuck:g} s {last.place}'
        rank = states.index(last)
        return f'Training made no progress for {self.stuck:g} s: process {rank} ({last.name}) is behind, {last.place}'

    def end(self, fault: str) -> None:
        """End the process from this thread, as the main thread may wait forever."""
        for process in multiprocessing.active_children():  # a suspended data worker would outlive the process
            process.kill()
        message = f'error: {fault}; look at the output and the machine of that process, and continue with --resume.'
        if not send_to_torchrun(message):
            print(message, file=sys.stderr, flush=True)
        os._exit(1)
