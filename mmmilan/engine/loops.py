"""Training by epochs: seeds of steps, resuming within an epoch, data workers that go on between epochs."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook, PrepareTTAHook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader

from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS, LOOPS


@LOOPS.register_module()
class EpochLoop(EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop`` that can resume within an epoch. Same arguments.

    Batches that are done are skipped in the sampler, so their images are not loaded. MMEngine's loop repeats the epoch
    from its first batch.

    Attributes:
        done: Steps of this epoch so far.
    """

    done = 0

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        if self.done and isinstance(self.dataloader, DataLoader):  # a ContinuousLoader skips them itself
            skip_batches(self.dataloader, self.done)
        for index, batch in enumerate(self.dataloader, start=self.done):
            self.done = index + 1
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self.done = 0


@HOOKS.register_module()
class SeveralViewsHook(PrepareTTAHook):
    """MMEngine's ``PrepareTTAHook`` in several processes too: mmseg's ``SegTTAModel`` reads attributes of the model."""

    def before_test(self, runner: Runner) -> None:
        runner.model = unwrap(runner.model)
        super().before_test(runner)


def use_epoch_loop(cfg: Config) -> None:
    """Replace the loop of a config that trains by epochs with :class:`EpochLoop`."""
    if cfg.train_cfg.get('by_epoch') or cfg.train_cfg.get('type') == 'EpochBasedTrainLoop':
        cfg.train_cfg.pop('by_epoch', None)
        cfg.train_cfg.type = 'mmmilan.EpochLoop'


def skip_batches(loader: DataLoader, count: int) -> None:
    """Skip the first ``count`` batches in the next pass over a loader; later passes are complete."""
    # DataLoader refuses to set the attribute after construction
    object.__setattr__(loader, 'batch_sampler', _Skipping(loader.batch_sampler, count))


class _Skipping:
    """Wraps a batch sampler and skips the first batches of its first pass."""

    def __init__(self, batch_sampler: Any, count: int) -> None:
        self.batch_sampler, self.count = batch_sampler, count

    def __iter__(self) -> Iterator[list]:
        # here and not in __iter__'s caller: PyTorch makes two iterators and uses only one
        count, self.count = self.count, 0
        yield from islice(self.batch_sampler, count, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch_sampler, name)


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


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Seed every training step with (seed, rank, iteration).

    The random numbers of a step (mask, stochastic depth, mixup) then do not depend on earlier steps, and a run that was
    killed and resumed ends with the weights of an uninterrupted one.
    """

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        key = (runner.seed, get_rank(), runner.iter)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
