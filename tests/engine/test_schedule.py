"""A schedule that fits the number of images, and warnings of one that does not."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR

from mmmilan.engine.launch import fit_processes
from mmmilan.engine.schedule import ScheduleCheckHook, fit_batch_size, fit_schedule, own_schedule


def test_schedule_fits_the_images():
    small = fit_schedule(3068, 32, None)
    assert small.steps_per_epoch == 95 and small.steps >= 10_000 and small.warmup == small.steps // 10
    assert 2e-4 < small.lr < 2.2e-4  # where the linear rule gives 1.9e-5
    assert fit_schedule(3068, 32, None, 384).lr == pytest.approx(2.52 * small.lr, rel=0.05)  # a ViT-S, half as wide
    assert fit_schedule(4096, 4096, None).lr == fit_schedule(4096, 4096, None, 192).lr == 2.4e-3  # the paper's, at most
    assert [fit_schedule(4167, 16, 4, width).lr for width in (96, 192, 768)] == [2.4e-3, 9.5e-4, 1.5e-4]
    assert fit_schedule(64, 8, None).epochs == 400
    assert fit_schedule(10**6, 128, None).epochs == 20
    assert [fit_batch_size(n, 128) for n in (3, 24, 64, 512, 3068)] == [3, 8, 8, 64, 128]


def test_schedule_follows_the_number_of_processes(monkeypatch, log):
    """Eight times the images in a step: an eighth of the steps with their own warm-up and rate, once and not twice."""
    one, eight = fit_schedule(3200, 32, 20), fit_schedule(3200, 256, 20)
    config = Config(
        dict(
            launcher='pytorch',
            model=dict(backbone=dict(arch='base')),
            train_cfg=dict(max_epochs=20),
            train_dataloader=dict(batch_size=32),
            param_scheduler=one.param_scheduler(),
            optim_wrapper=dict(optimizer=dict(lr=one.lr)),
            auto_scale_lr=dict(enable=False, base_batch_size=32),
        )
    )
    fit_processes(config)
    assert own_schedule(config) == one and not log.text
    monkeypatch.setenv('WORLD_SIZE', '8')
    for _ in range(2):
        fit_processes(config)
        assert own_schedule(config) == eight and config.optim_wrapper.optimizer.lr == eight.lr > 2.8 * one.lr
    assert log.text.count('256 images in a step, of all processes: 12 steps an epoch, the first 24 for warm-up') == 1
    config.optim_wrapper.optimizer.lr = 1e-3  # the user's own
    monkeypatch.setenv('WORLD_SIZE', '1')
    fit_processes(config)
    assert config.optim_wrapper.optimizer.lr == 1e-3 and config.auto_scale_lr.base_batch_size == 32
    config.param_scheduler[0]['start_factor'] = 0.5
    before = config.to_dict()
    monkeypatch.setenv('WORLD_SIZE', '8')
    fit_processes(config)
    assert config.to_dict() == before


def warnings_of(caplog, schedules, steps: int) -> str:
    """The hook's warnings in a run with ten steps an epoch; ``schedules`` as MMEngine's runner has them."""
    caplog.clear()
    runner = SimpleNamespace(
        max_iters=steps,
        param_schedulers=schedules,
        train_dataloader=[None] * 10,
        logger=logging.getLogger('schedule'),
    )
    ScheduleCheckHook().before_train(runner)
    return caplog.text


def schedulers(warmup: int, by_epoch: bool) -> list:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return [LinearLR(optimizer, end=warmup, by_epoch=by_epoch), CosineAnnealingLR(optimizer, T_max=1000)]


@pytest.mark.parametrize('schedules', [None, [], {}])
def test_a_run_without_schedules(caplog, schedules):
    """``param_scheduler=None`` leaves the runner without schedulers."""
    assert warnings_of(caplog, schedules, 1000) == ''
    assert 'The run has 299 steps, too few to learn much' in warnings_of(caplog, schedules, 299)


def test_a_run_that_is_mostly_warm_up(caplog):
    assert warnings_of(caplog, schedulers(500, by_epoch=False), 1000) == ''
    assert '50% of the 1000 steps are warm-up' in warnings_of(caplog, schedulers(501, by_epoch=False), 1000)
    assert '60% of the 1000 steps are warm-up' in warnings_of(caplog, schedulers(60, by_epoch=True), 1000)
    by_optimizer = dict(encoder=schedulers(10, by_epoch=False), decoder=schedulers(2000, by_epoch=False))
    assert '100% of the 1000 steps are warm-up' in warnings_of(caplog, by_optimizer, 1000)


def test_a_run_that_is_longer_than_its_schedule(caplog):
    """As after raising ``max_epochs`` alone: the rest would be trained at the last, smallest rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedules = [LinearLR(optimizer, end=2, by_epoch=False), CosineAnnealingLR(optimizer, T_max=98, end=100)]
    assert warnings_of(caplog, schedules, 1000) == ''
    assert 'stays as it is after step 1000 of 2000' in warnings_of(caplog, schedules, 2000)
