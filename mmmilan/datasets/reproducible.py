"""Augmentations that depend only on (seed, epoch, sample).

MMEngine seeds data workers once, or the same way at every epoch. Augmentations then depend on the number of workers,
and a resumed run sees other images than an uninterrupted one. Here the sampler gives the dataset a random seed for each
sample along with its index.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from mmengine.dataset import DefaultSampler

from mmmilan.registry import DATA_SAMPLERS


class Draw(NamedTuple):
    """One sample of one epoch, as the sampler asks for it."""

    seed: int
    epoch: int
    index: int


@DATA_SAMPLERS.register_module()
class ReproducibleSampler(DefaultSampler):
    """MMEngine's ``DefaultSampler`` that yields a :class:`Draw` in place of an index.

    For datasets that accept a :class:`Draw`, such as those of mmmilan. Same arguments.
    """

    def __iter__(self) -> Iterator[Draw]:
        indices = super().__iter__()
        return (Draw(self.seed, self.epoch, index) for index in indices)


# NumPy's generator within ``seeded``: exchanging generators is much faster than saving and restoring a state.
GENERATOR = np.random.MT19937(0)


@contextmanager
def seeded(draw: Draw) -> Iterator[None]:
    """Within this context Python's, NumPy's and PyTorch's (CPU) random numbers are those of ``draw``."""
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(draw).generate_state(1)[0])
    np.random.set_bit_generator(GENERATOR)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])
        torch.set_rng_state(states[2])
