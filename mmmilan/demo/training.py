"""Training with a progress bar."""

from __future__ import annotations

import time
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()


class ProgressHook(Hook):
    """A progress bar in place of MMEngine's log lines, which are only written to the work dir."""

    def __init__(self, description: str) -> None:
        columns = [TextColumn('{task.description:18}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self.progress = Progress(*columns, TextColumn('loss {task.fields[loss]}'), console=console)
        self.description = description

    def before_train(self, runner: Runner) -> None:
        self.task = self.progress.add_task(self.description, total=runner.max_iters, loss='')
        self.progress.start()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.progress.update(self.task, completed=runner.iter + 1, loss=f'{outputs["loss"].item():.3f}')

    def after_train(self, runner: Runner) -> None:
        self.progress.stop()

    def before_test(self, runner: Runner) -> None:
        self.task = self.progress.add_task(f'{self.description}: test', total=len(runner.test_dataloader), loss='')
        self.progress.start()

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.progress.update(self.task, completed=batch_idx + 1)

    def after_test(self, runner: Runner) -> None:
        self.progress.stop()


def train(cfg: Config, description: str) -> tuple[Runner, float]:
    """Train from a config; returns the runner and the seconds that training took."""
    cfg.log_level = 'ERROR'
    cfg.default_hooks.checkpoint.interval = -1  # only the last one
    cfg.experiment_name = f'{Path(cfg.work_dir).name}-{time.time_ns()}'
    runner = Runner.from_cfg(cfg)
    runner.register_hook(ProgressHook(description))
    start = time.time()
    runner.train()
    return runner, time.time() - start
