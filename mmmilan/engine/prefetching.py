"""Data workers that do not stop between two epochs."""

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
    """The batches of several epochs, one after the other, as a batch sampler.

    Args:
        batches: The batch sampler of an epoch, whose sampler has ``set_epoch``.
        start: The first epoch.
        end: The epoch after the last one.
        done: Batches of the first epoch to leave out.
    """

    def __init__(self, batches: BatchSampler, start: int, end: int, done: int = 0) -> None:
        # copies, as MMEngine tells its own sampler the epoch that trains, and these are ahead of it
        self.batches = copy.copy(batches)
        self.batches.sampler = copy.copy(batches.sampler)
        self.epochs = range(start, end)
        self.done = done

    def __iter__(self) -> Iterator[list]:
        for epoch in self.epochs:
            self.batches.sampler.set_epoch(epoch)
            yield from islice(self.batches, self.done if epoch == self.epochs.start else 0, None)


class ContinuousLoader:
    """A data loader that loads the first batches of the next epoch while the last ones of an epoch are trained on.

    Each iteration gives the batches of one epoch, the same as those of ``loader``, of which it has all attributes. The
    first one leaves out the batches that are ``done`` already.
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
    """Let the data workers go on over the end of an epoch, where MMEngine's wait for the next one to begin.

    The data stay the same. For runs by epochs with workers, and samplers that are told the epoch.
    """

    priority = 'LOW'  # hooks that look at the loader, or change its epoch, come first

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
                next(loader.batches, None)  # there is none, at which the workers end
            runner.train_loop.dataloader = loader.loader
