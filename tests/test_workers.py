"""Data workers: one that dies ends what reads in one sentence, and nothing else; processes that can start none."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mmmilan.errors import InputError
from mmmilan.workers import check_workers, default_workers, read_batches
from processes import fork


class Numbers(Dataset):
    """One of them ends its worker."""

    def __init__(self, fatal: int | None = None, fault: Exception | None = None) -> None:
        self.fatal, self.fault = fatal, fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == self.fatal and self.fault:
            raise self.fault
        if index == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """PyTorch looks for dead workers every 5 s."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, '__defaults__', (0.1,))


def read(dataset: Dataset, option: str = '') -> list[list[int]]:
    return [batch.tolist() for batch in read_batches(DataLoader(dataset, 2, num_workers=2), option)]


def test_a_worker_that_dies_is_said_in_one_sentence():
    """The others of its loader end, and no other process of the program."""
    assert read(Numbers()) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    other = fork(time.sleep, 60)
    handler = signal.getsignal(signal.SIGCHLD)
    for option, remedy in (('num_workers', 'lower num_workers'), ('', 'free some')):
        with pytest.raises(InputError, match=f'^DataLoader worker .*; if memory or /dev/shm ran out, {remedy}.$'):
            read(Numbers(fatal=5), option)
        assert multiprocessing.active_children() == [other]
    assert signal.getsignal(signal.SIGCHLD) is handler
    other.kill()


def test_other_code_goes_on_when_a_worker_dies():
    """PyTorch would raise there."""
    before = set(multiprocessing.active_children())
    batches = read_batches(DataLoader(Numbers(), 2, num_workers=1, prefetch_factor=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    time.sleep(0.2)
    with pytest.raises(InputError, match='^DataLoader worker'):
        list(batches)


def test_the_error_of_another_loader_passes():
    """PyTorch raises it wherever the program is."""
    fault = RuntimeError('DataLoader worker (pid 1) is killed by signal: Killed.')
    with pytest.raises(RuntimeError, match='^DataLoader worker'):
        list(read_batches(DataLoader(Numbers(3, fault), 2, num_workers=0)))


def test_a_daemonic_process_starts_none(monkeypatch):
    """Such as a worker of Celery, or of multiprocessing.Pool."""
    assert default_workers(1) == 1 and default_workers(10**6) == os.cpu_count()
    check_workers(['num_workers'])
    monkeypatch.setitem(multiprocessing.current_process()._config, 'daemon', True)
    assert default_workers(10**6) == 0
    check_workers([])
    with pytest.raises(InputError, match=r'^num_workers is above 0, but .* is daemonic, .* workers; set it to 0\.$'):
        check_workers(['num_workers'])
    with pytest.raises(InputError, match=r'^a and b are above 0, .* set them to 0\.$'):
        check_workers(['a', 'b'])
