"""Keep data workers busy between two epochs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader

from mmmilan.registry import HOOKS


class Epochs:
    """A batch sampler that concatenates several epochs.

    Args:
        batches: The batch sampler of one epoch; its sampler has ``set_epoch``.
        start: The first epoch.
        end: The epoch after the last one.
        done: Number of batches of the first epoch to skip.
    """

    def __init__(self, batches: BatchSampler, start: int, end: int, done: int = 0) -> None:
        # copies: MMEngine sets the current epoch on its own sampler, and these are ahead of it
        self.batches = copy.copy(batches)
        self.batches.sampler = copy.copy(batches.sampler)
        self.epochs = range(start, end)
        self.done = done

    def __iter__(self) -> Iterator[list]:
        for epoch in self.epochs:
            self.batches.sampler.set_epoch(epoch)
            yield from islice(self.batches, self.done if epoch == self.epochs.start else 0, None)


class ContinuousLoader:
    """A data loader that already loads the next epoch's first batches during an epoch's last steps.

    Each pass gives the batches of one epoch, the same as those of ``loader``, and all of its attributes. The first pass
    skips the ``done`` first batches.
    """

    def __init__(self, loader: DataLoader, start: int, end: int, done: int = 0) -> None:
        self.loader = loader
        self.done = done
        self.batches = iter(
            DataLoader(
                loader.dataset,
                batch_sampler=Epochs(loader.batch_sampler, start, end, done),
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                generator=loader.generator,
                prefetch_factor=loader.prefetch_factor,
            )
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        remaining, self.done = len(self.loader) - self.done, 0
        for _ in range(remaining):
            yield next(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


@HOOKS.register_module()
class PrefetchHook(Hook):
    """Let data workers load across the end of an epoch; MMEngine's wait until the next epoch starts.

    The batches are the same. For runs by epochs with data workers and samplers that have ``set_epoch``.
    """

    priority = 'LOW'  # after hooks that read the loader or change its epoch

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        loader = loop.dataloader
        by_epoch = isinstance(loop, EpochBasedTrainLoop) and hasattr(loader.batch_sampler.sampler, 'set_epoch')
        if by_epoch and loader.num_workers:
            loop.dataloader = ContinuousLoader(loader, runner.epoch, runner.max_epochs, getattr(loop, 'done', 0))

    def after_train(self, runner: Runner) -> None:
        loader = runner.train_loop.dataloader
        if isinstance(loader, ContinuousLoader):
            if runner.epoch == runner.max_epochs:
                next(loader.batches, None)  # exhausted, which ends the workers
            runner.train_loop.dataloader = loader.loader
