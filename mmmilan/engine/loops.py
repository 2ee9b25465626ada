"""Epochs that a resumed run goes on with where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from mmmilan.registry import LOOPS


@LOOPS.register_module()
class EpochLoop(EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop`` that can begin within an epoch. Same arguments.

    The batches before are skipped in the sampler, so nothing is loaded for them. MMEngine's repeats the epoch from its
    first batch, with other weights.

    Attributes:
        done: Steps of this epoch so far.
    """

    done = 0

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        if self.done and isinstance(self.dataloader, DataLoader):  # a ContinuousLoader begins there by itself
            skip_batches(self.dataloader, self.done)
        for index, batch in enumerate(self.dataloader, start=self.done):
            self.done = index + 1
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self.done = 0


def use_epoch_loop(cfg: Config) -> None:
    """Let a config that trains by epochs do so by :class:`EpochLoop`."""
    if cfg.train_cfg.get('by_epoch') or cfg.train_cfg.get('type') == 'EpochBasedTrainLoop':
        cfg.train_cfg.pop('by_epoch', None)
        cfg.train_cfg.type = 'mmmilan.EpochLoop'


def skip_batches(loader: DataLoader, count: int) -> None:
    """Let the next pass over a loader begin after ``count`` batches; later passes are whole again."""
    # PyTorch forbids another sampler for the sake of those that would contradict the other arguments
    object.__setattr__(loader, 'batch_sampler', _Skipping(loader.batch_sampler, count))


class _Skipping:
    """A batch sampler whose first pass begins late; in all else the one that it stands for."""

    def __init__(self, batch_sampler: Any, count: int) -> None:
        self.batch_sampler, self.count = batch_sampler, count

    def __iter__(self) -> Iterator[list]:
        # at the first batch, as PyTorch asks for a second iterator before it uses one
        count, self.count = self.count, 0
        yield from islice(self.batch_sampler, count, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch_sampler, name)
