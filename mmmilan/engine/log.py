"""The log of a run: when a line is due, what stands on the console and what in the file alone."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

from mmengine.dist import broadcast_object_list, master_only
from mmengine.hooks import LoggerHook, RuntimeInfoHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import Tensor

from mmmilan.registry import HOOKS, RUNNERS

MAX_LINES = 5
# How messages begin that no user can act on: MMEngine's options of single parameters, and its words on itself.
LEFT_OUT = (
    'paramwise_options',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    'Distributed training is not used, all SyncBatchNorm',
)


@RUNNERS.register_module()
class ConsoleRunner(Runner):
    """MMEngine's runner; environment, config, hooks and what :data:`LEFT_OUT` names go to the log file only."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(is_for_console)
        # The configs pin memory for GPUs; PyTorch does not on a CPU, and says so.
        warnings.filterwarnings('ignore', "'pin_memory' argument is set as true but no accelerator is found")
        return logger


def is_for_console(record: logging.LogRecord) -> bool:
    """Whether a record is a warning or a message of few lines, and none of those that are left out."""
    message = record.getMessage()
    short = message.count('\n') < MAX_LINES or record.levelno > logging.INFO
    return short and not message.startswith(LEFT_OUT)


def log_is_due(runner: Runner, batch_idx: int) -> bool:
    """Whether MMEngine's ``LoggerHook`` may write a line after this step."""
    interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 1)
    return (batch_idx + 1) % interval == 0 or batch_idx + 1 == len(runner.train_dataloader)


@HOOKS.register_module()
class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """MMEngine's ``RuntimeInfoHook``, but losses are copied from the GPU only when a log line is due.

    MMEngine's hook copies them after every step, and so waits for the GPU before the next step. The losses of all steps
    are still logged. Where rates differ between layers, the log has the head's too, the highest: MMEngine's ``lr`` is
    that of the first layer. In a config: ``default_hooks.runtime_info``.
    """

    def __init__(self) -> None:
        self.pending: list[dict] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        super().before_train_iter(runner, batch_idx, data_batch)
        rates = runner.optim_wrapper.get_lr().get('lr') or [0.0]
        if max(rates) > rates[0]:
            runner.message_hub.update_scalar('train/head_lr', max(rates))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        # a copy, as a later step may write to the same memory
        self.pending.append({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in outputs.items()})
        if log_is_due(runner, batch_idx):
            for outputs in self.pending:
                super().after_train_iter(runner, batch_idx, data_batch, outputs)
            self.pending.clear()


@HOOKS.register_module()
class MainLoggerHook(LoggerHook):
    """MMEngine's ``LoggerHook``, with a line every few seconds even if steps are slow.

    Only the main process writes the scores of a test; with MMEngine's hook all processes write the same file at once.

    Args:
        interval: Maximum number of steps between two lines.
        seconds: Maximum time between two lines, unless one step takes longer.
        kwargs: Other arguments of ``LoggerHook``.
    """

    def __init__(self, interval: int = 10, seconds: float = 10.0, **kwargs) -> None:
        super().__init__(interval=interval, **kwargs)
        self.max_interval = interval
        self.seconds = seconds

    after_test_epoch = master_only(LoggerHook.after_test_epoch)

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.last = runner.iter, time.monotonic()
        self.interval = 1  # until the duration of a step is known

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        due = log_is_due(runner, batch_idx)
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if due:  # only now, as all hooks must see the same interval
            step, now = runner.iter + 1, time.monotonic()
            pace = (now - self.last[1]) / max(1, step - self.last[0])
            interval = [max(1, min(self.max_interval, int(self.seconds / max(pace, 1e-6))))]
            broadcast_object_list(interval)  # hooks exchange losses when a line is due
            self.interval, self.last = interval[0], (step, now)
