"""A run gives back what it changes of the program that starts it."""

from __future__ import annotations

import multiprocessing
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import Runner

import mmmilan
from mmmilan.engine.program import SIGNALS
from mmmilan.errors import InputError


def state() -> dict:
    """What a run changes, and the next random numbers."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = random.random(), np.random.rand(), torch.rand(1).item()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return dict(
        python=numbers[0],
        torch=numbers[2],
        handlers=[signal.getsignal(number) for number in SIGNALS],
        opencv=cv2.getNumThreads(),
        method=multiprocessing.get_start_method(allow_none=True),
        benchmark=torch.backends.cudnn.benchmark,
        mmengine=(Runner.dump_config, Runner.setup_env),
        writers=sum(type(thread).__module__.startswith('tensorboard') for thread in threading.enumerate()),
    )


@pytest.fixture
def start_method():
    """None has been chosen, as in a new process."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(None, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize('fails', [False, True])
def test_a_program_is_as_before(tiny_config, start_method, monkeypatch, tmp_path, fails):
    changes = {'train_dataloader.num_workers': 0, 'train_cfg.max_epochs': 1}
    changes['visualizer.vis_backends'] = [dict(type='TensorboardVisBackend')]
    config, threads = tiny_config(changes), cv2.getNumThreads()
    cv2.setNumThreads(2)
    random.seed(1)
    torch.manual_seed(2)
    before = state()
    if fails:
        monkeypatch.setattr('mmmilan.models.MILAN.loss', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mmmilan.train(config)
    else:
        mmmilan.train(config)
    assert state() == before
    cv2.setNumThreads(threads)


def test_runs_without_a_seed_differ(tiny_config, tmp_path):
    config = tiny_config({'train_dataloader.num_workers': 0, 'train_cfg.max_epochs': 1, 'randomness': dict(seed=None)})
    np.random.seed(0)
    weights = []
    for name in ('first', 'second'):
        mmmilan.train(config, work_dir=tmp_path / name)
        content = torch.load(tmp_path / name / 'epoch_1.pth', weights_only=False)
        weights.append(content['state_dict']['backbone.patch_embed.projection.weight'])
    assert not torch.equal(*weights)


def test_a_process_trains_once_at_a_time(tiny_config, monkeypatch, tmp_path):
    """Also in another folder: the random numbers are the process's."""
    from mmmilan.models import MILAN

    config = tiny_config({'train_dataloader.num_workers': 0, 'train_cfg.max_epochs': 1})
    begun, go_on, loss = threading.Event(), threading.Event(), MILAN.loss

    def wait(self, *args):
        begun.set()
        assert go_on.wait(60)
        return loss(self, *args)

    monkeypatch.setattr(MILAN, 'loss', wait)
    with ThreadPoolExecutor() as executor:
        first = executor.submit(mmmilan.train, config, work_dir=tmp_path / 'first')
        try:
            assert begun.wait(60)
            with pytest.raises(InputError, match='^Another training runs in this process'):
                mmmilan.train(config, work_dir=tmp_path / 'second')
        finally:
            go_on.set()
        first.result()
    assert not (tmp_path / 'second').exists()
    mmmilan.train(config, work_dir=tmp_path / 'second')
