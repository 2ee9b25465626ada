"""Data workers that continue into the next epoch give the same batches."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from helpers import assert_identical, load_trusted, read_scalars
from mmmilan.datasets import Draw, ReproducibleSampler
from mmmilan.engine.loops import ContinuousLoader


class Draws(Dataset):
    """Returns the sampler's draws, each after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 12

    def __getitem__(self, draw: Draw) -> tuple:
        time.sleep(self.seconds)
        return draw.seed, draw.crop, draw.index


def loader(seconds: float = 0) -> DataLoader:
    """Three batches from one worker."""
    draws = Draws(seconds)
    sampler = ReproducibleSampler(draws, shuffle=True, seed=3)
    return DataLoader(draws, batch_size=4, sampler=sampler, num_workers=1, collate_fn=torch.tensor)


@pytest.mark.parametrize('start', [0, 2])
def test_the_same_batches(start):
    plain, continuous = loader(), ContinuousLoader(loader(), start, 4)
    for epoch in range(start, 4):
        plain.sampler.set_epoch(epoch)
        continuous.sampler.set_epoch(epoch)  # as MMEngine does, late
        expected, actual = list(plain), list(continuous)
        assert len(actual) == len(continuous) == 3
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert {int(draw[1]) for batch in actual for draw in batch} == {epoch}
    assert next(continuous.batches, None) is None


def test_from_within_an_epoch():
    """The rest of the first epoch, then whole ones."""
    plain, continuous = loader(), ContinuousLoader(loader(), 1, 3, done=2)
    for epoch, count in ((1, 1), (2, 3)):
        plain.sampler.set_epoch(epoch)
        expected, actual = list(plain)[-count:], list(continuous)
        assert len(actual) == count
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.slow
def test_no_wait_at_the_start_of_an_epoch():
    """A batch takes 0.2 s to load; a prefetched one takes no time, from the first epoch on."""
    waits = []
    for batches in (loader(0.05), ContinuousLoader(loader(0.05), 0, 2)):
        for _ in range(2):
            start = time.perf_counter()
            for i, _ in enumerate(batches):
                if i == 0:
                    waits.append(time.perf_counter() - start)
            time.sleep(0.5)  # validation, say
    plain, continuous = waits[:2], waits[2:]
    assert min(plain) > 0.2 and max(continuous) < 0.5 * min(plain)


@pytest.mark.slow
def test_training(tiny_config, run_tool, tmp_path):
    """The losses of two epochs, and a resumed run's weights, are those of a run without workers."""
    plain = tiny_config({'train_dataloader.num_workers': 0, 'work_dir': str(tmp_path / 'plain')})
    run_tool('train.py', plain)
    run_tool('train.py', tiny_config())
    losses = [[record['loss'] for record in read_scalars(tmp_path / folder)] for folder in ('plain', 'work')]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    again = tiny_config({'work_dir': str(tmp_path / 'again')})
    run_tool('train.py', again, '--resume', tmp_path / 'work/epoch_1.pth')
    assert_identical(*(load_trusted(tmp_path / folder / 'epoch_2.pth') for folder in ('again', 'plain')))
