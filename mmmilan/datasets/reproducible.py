"""Augmentations that depend only on (seed, crop, sample), where each epoch has a crop of its own or they come again.

MMEngine seeds data workers once, or the same way at every epoch. Augmentations then depend on the number of workers,
and a resumed run sees other images than an uninterrupted one. Here the sampler gives a random seed for each
sample along with its index, and samples are fetched with that seed, whatever the data set: one of mmmilan, a wrapper
(``ConcatDataset``, ``ClassBalancedDataset``, ``MultiImageMixDataset``), or one of another library.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from torch import Tensor
from torch.utils.data import BatchSampler

from mmmilan.errors import InputError, warn
from mmmilan.registry import DATA_SAMPLERS


class Draw(int):
    """One crop of one sample, as the sampler asks for it: the index, which is an int to any data set, and the seed."""

    def __new__(cls, seed: int, crop: int, index: int) -> Draw:
        draw = super().__new__(cls, index)
        draw.seed, draw.crop, draw.index = seed, crop, int(index)
        return draw

    def __getnewargs__(self) -> tuple[int, int, int]:
        return self.seed, self.crop, self.index


@DATA_SAMPLERS.register_module()
class ReproducibleSampler(DefaultSampler):
    """MMEngine's ``DefaultSampler`` that yields a :class:`Draw`, and lets the data set fetch each in :func:`seeded`.

    An augmentation with a generator of its own, besides those of Python, NumPy and PyTorch, is as MMEngine seeds it; so
    is a data set that is not an object of a Python class, such as a list, which the log says.

    Args:
        dataset: The data set.
        crops: Number K of ways in which a sample is augmented: epoch e has that of epoch e modulo K, in another order.
            By default there is a new one in each epoch.
        args: Other arguments of ``DefaultSampler``.
        kwargs: Likewise.

    Raises:
        InputError: there is no crop.
    """

    def __init__(self, dataset: Any, *args, crops: int | None = None, **kwargs) -> None:
        super().__init__(dataset, *args, **kwargs)
        if crops is not None and crops < 1:
            raise InputError(f'sampler.crops={crops} leaves no crop; choose 1 or more, or None for new ones.')
        self.crops = crops
        try:
            dataset.__getitems__ = partial(fetch, dataset)  # what PyTorch's DataLoader asks for a batch
        except AttributeError:
            warn(f'Augmentations of {type(dataset).__name__} are seeded as by MMEngine: another run has others.')

    def __iter__(self) -> Iterator[Draw]:
        order = self.order()  # not the list of ``DefaultSampler``, which has an object for each index
        crop = self.epoch % self.crops if self.crops else self.epoch
        for place in range(self.rank, self.total_size, self.world_size):  # round_up begins again at the end
            yield Draw(self.seed, crop, int(order[place % len(order)]))

    def order(self) -> Tensor:
        """The order of all samples in this epoch: that of ``DefaultSampler``, [M], int64."""
        size = len(self.dataset)
        if not self.shuffle:
            return torch.arange(size)
        return torch.randperm(size, generator=torch.Generator().manual_seed(self.seed + self.epoch))


@DATA_SAMPLERS.register_module()
class WholeSteps(BatchSampler):
    """The batches of an epoch but the last ones, which are too few for a step of accumulated gradients.

    A checkpoint holds no gradients, so a step that began before it and ends after it could not be resumed.

    Args:
        sampler: Of the images.
        batch_size: Images of a batch.
        batches: Batches of a step.
    """

    def __init__(self, sampler: DefaultSampler, batch_size: int, batches: int) -> None:
        super().__init__(sampler, batch_size, drop_last=True)
        self.of_a_step = batches

    def __len__(self) -> int:
        return super().__len__() // self.of_a_step * self.of_a_step

    def __iter__(self) -> Iterator[list]:
        return islice(super().__iter__(), len(self))


def fetch(dataset: Any, indices: Sequence[int]) -> list:
    """Samples of a data set, each that a :class:`Draw` asks for with its random numbers."""
    samples = []
    for index in indices:
        with seeded(index) if isinstance(index, Draw) else nullcontext():
            samples.append(dataset[index])
    return samples


CURRENT: ContextVar[Draw | None] = ContextVar('CURRENT', default=None)  # of ``seeded``
# NumPy's generator within ``seeded``: exchanging generators is much faster than saving and restoring a state.
GENERATOR = np.random.MT19937(0)


@contextmanager
def seeded(draw: Draw) -> Iterator[None]:
    """Within this context Python's, NumPy's and PyTorch's (CPU) random numbers are those of ``draw``.

    Where it is the one already, numbers go on: a wrapper hands its draw to the data set within.
    """
    if CURRENT.get() is draw:
        yield
        return
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    seed = int(np.random.SeedSequence((draw.seed, draw.crop, draw.index)).generate_state(1)[0])
    np.random.set_bit_generator(GENERATOR)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    token = CURRENT.set(draw)
    try:
        yield
    finally:
        CURRENT.reset(token)
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])
        torch.set_rng_state(states[2])
