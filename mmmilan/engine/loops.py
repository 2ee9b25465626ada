"""Resume within an epoch."""

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
