"""Save a checkpoint when a run is told to stop, and exit with a status that asks to be resumed."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

import torch
import torch.distributed as dist
from mmengine.dist import is_distributed
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmmilan.engine.checkpointing import CheckpointHook
from mmmilan.registry import HOOKS

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # a scheduler's end, Ctrl-C, Slurm's warning (--signal=USR1)
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
        self.before = {number: signal.signal(number, self.receive) for number in SIGNALS}
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
        print_log(
            f'{signal.Signals(number).name}: stopped after iteration {runner.iter + 1}, saved {saved}; continue '
            f'with --resume (exit status {RESUMABLE}).',
            logger='current',
            level=logging.WARNING,
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
        for number, handler in self.before.items():
            signal.signal(number, handler)
