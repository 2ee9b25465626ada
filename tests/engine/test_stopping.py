"""A run that is stopped anywhere, by a signal or between two checkpoints, goes on to the same weights, bit by bit."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.runner import ValLoop

from helpers import assert_identical, load_trusted, rest_slow
from mmmilan.checkpoints.io import find_newest
from mmmilan.engine.loops import PrefetchHook
from mmmilan.engine.stopping import RESUMABLE, EarlyStoppingHook, StopHook
from mmmilan.errors import InputError
from processes import exit_code, exit_codes
from small_runs import Model, Numbers, runner, start_run

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOOP = dict(type='mmmilan.EpochLoop', max_epochs=3)
ACCUMULATING = dict(optimizer=dict(type='AdamW', lr=0.01), accumulative_counts=2)


class SignalHook(Hook):
    """Send this process a signal after a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.step:
            os.kill(os.getpid(), self.number)


def run(work_dir: Path, *hooks: Hook, **kwargs) -> None:
    built = runner(work_dir, length=10, train_cfg=dict(LOOP), **kwargs)
    for hook in hooks:
        built.register_hook(hook)
    built.register_hook(StopHook())
    built.train()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The last checkpoint of an uninterrupted run."""
    work_dir = tmp_path_factory.mktemp('whole')
    run(work_dir)
    return load_trusted(work_dir / 'epoch_3.pth')


@pytest.mark.parametrize('step', rest_slow([0, 3, 4, 6, 13], 4, 6))
@pytest.mark.parametrize('number', rest_slow(SIGNALS, signal.SIGTERM))
def test_a_signal_at_any_step(tmp_path, safe_mmengine, whole, number, step):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, SignalHook(number, step))
    assert stopped.value.code == RESUMABLE
    assert signal.getsignal(number) is before
    newest = find_newest(tmp_path)
    assert newest.name == f'stopped_iter_{step + 1}.pth'
    run(tmp_path, load_from=str(newest), resume=True)
    assert_identical(load_trusted(tmp_path / 'epoch_3.pth'), whole)
    assert not list(tmp_path.glob('stopped_*'))


def test_a_signal_in_the_last_step(tmp_path, safe_mmengine):
    """No step is left, so the run ends as without a signal."""
    run(tmp_path, SignalHook(signal.SIGTERM, 14))
    assert {path.name for path in tmp_path.glob('*.pth')} == {'epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth'}


@pytest.mark.parametrize('hooks', rest_slow([(), (PrefetchHook,)], (PrefetchHook,)), ids=['', 'prefetching'])
def test_a_signal_with_data_workers(tmp_path, safe_mmengine, whole, hooks):
    """Also when the workers have begun the next epoch."""
    args = (tmp_path, SignalHook(signal.SIGTERM, 6), *[hook() for hook in hooks])
    # a fork: in this process the garbage collector would wait 5 s for each worker of the stopped run
    assert exit_code(run, *args, num_workers=2) == RESUMABLE
    newest = str(find_newest(tmp_path))
    run(tmp_path, *[hook() for hook in hooks], load_from=newest, resume=True, num_workers=2)
    assert_identical(load_trusted(tmp_path / 'epoch_3.pth'), whole)


def test_gradients_that_accumulate_are_not_cut_in_two(tmp_path, safe_mmengine):
    run(tmp_path / 'whole', optim_wrapper=ACCUMULATING)
    with pytest.raises(SystemExit):
        run(tmp_path / 'work', SignalHook(signal.SIGTERM, 6), optim_wrapper=ACCUMULATING)
    newest = find_newest(tmp_path / 'work')
    assert newest.name == 'stopped_iter_8.pth'
    run(tmp_path / 'work', load_from=str(newest), resume=True, optim_wrapper=ACCUMULATING)
    assert_identical(load_trusted(tmp_path / 'work/epoch_3.pth'), load_trusted(tmp_path / 'whole/epoch_3.pth'))


# -- several processes


class Level(BaseMetric):
    """A score that never changes."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=1.0)


class Predicting(Model):
    def forward(self, *inputs, mode):
        return super().forward(*inputs, mode=mode) if mode == 'loss' else [0]


@pytest.mark.parametrize('checkpoint', [{}, dict(save_best='score', rule='greater')], ids=['', 'the best too'])
def test_patience_of_a_run_that_is_killed_while_it_validates(tmp_path, safe_mmengine, monkeypatch, checkpoint):
    """The interrupted validation counts, whether or not it chooses the best checkpoint, too."""
    validation = dict(val_dataloader=dict(dataset=Numbers(2), batch_size=2, sampler=dict(type='DefaultSampler')))
    validation |= dict(val_cfg={}, val_evaluator=Evaluator(Level()))

    def train(**kwargs) -> None:
        parts = copy.deepcopy(validation) | dict(model=Predicting(), checkpoint=dict(checkpoint))
        built = runner(tmp_path, epochs=6, **parts, **kwargs)
        built.register_hook(EarlyStoppingHook(monitor='score', rule='greater', patience=2))
        built.train()

    with monkeypatch.context() as patch:
        validate = ValLoop.run
        patch.setattr(ValLoop, 'run', lambda loop: 1 / 0 if loop.runner.epoch == 2 else validate(loop))
        with pytest.raises(ZeroDivisionError):
            train()
    train(resume=True, load_from=str(tmp_path / 'epoch_2.pth'))
    assert find_newest(tmp_path).name == 'epoch_3.pth'


def run_rank(work_dir: Path, sender: int | None = None, number: int = 0, step: int = 0, **kwargs) -> None:
    """Train on a rank; rank ``sender`` gets a signal."""
    run(work_dir, *([SignalHook(number, step)] if get_rank() == sender else []), **kwargs)


def resume_rank(work_dir: Path, newest: Path, **kwargs) -> None:
    run(work_dir, load_from=str(newest), resume=True, **kwargs)


@pytest.fixture(scope='module')
def whole_of_two(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('whole')
    assert exit_codes(start_run(run_rank, work_dir)) == [0, 0]
    return load_trusted(work_dir / 'epoch_3.pth')


@pytest.mark.slow
@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize('sender, step', [(0, 0), (1, 2), (1, 5)])
def test_a_signal_to_one_of_two_processes(tmp_path, safe_mmengine, whole_of_two, number, sender, step):
    """Both stop after the same step, the next one, and one of them saves."""
    assert exit_codes(start_run(run_rank, tmp_path, sender, number, step)) == [RESUMABLE, RESUMABLE]
    (stopped,) = tmp_path.glob('stopped_*.pth')
    assert find_newest(tmp_path) == stopped == tmp_path / f'stopped_iter_{step + 2}.pth'
    assert exit_codes(start_run(resume_rank, tmp_path, stopped)) == [0, 0]
    assert_identical(load_trusted(tmp_path / 'epoch_3.pth'), whole_of_two)


@pytest.mark.parametrize('step', rest_slow([1, 4, 5, 7, 12], 5, 7))
def test_checkpoints_within_an_epoch(tmp_path, safe_mmengine, step):
    by_step = dict(by_epoch=False)
    run(tmp_path / 'whole', checkpoint=by_step)
    resumed = dict(load_from=str(tmp_path / f'whole/iter_{step}.pth'), resume=True)
    run(tmp_path / 'work', checkpoint=by_step, **resumed)
    assert_identical(load_trusted(tmp_path / 'work/iter_15.pth'), load_trusted(tmp_path / 'whole/iter_15.pth'))


def test_an_epoch_of_another_length_is_not_resumed(tmp_path, safe_mmengine):
    with pytest.raises(SystemExit):
        run(tmp_path / 'work', SignalHook(signal.SIGTERM, 6))
    built = runner(
        tmp_path / 'work', length=8, train_cfg=dict(LOOP), load_from=str(find_newest(tmp_path / 'work')), resume=True
    )
    with pytest.raises(InputError, match=r'stopped_iter_7\.pth was saved at step 2 .*steps in an epoch: 5 -> 4'):
        built.train()
