"""The speed in the log is right, and measuring it changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import read_scalars
from mmmilan.engine import DeferredRuntimeInfoHook


def test_throughput_in_the_log(tiny_config, run_tool, tmp_path):
    hooks = [dict(type='mmmilan.ThroughputHook', peak_tflops=0.001)]
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    logger = dict(type='LoggerHook', interval=3)  # whose lines do not depend on the time
    changes = {'custom_hooks': hooks, 'default_hooks.logger': logger, 'visualizer.vis_backends': backends}
    changes |= {'log_processor': dict(window_size=3), 'train_dataloader.num_workers': 0}
    run_tool('train.py', tiny_config(changes))
    names = ['images_per_s', 'mfu', 'data_wait', 'peak_memory_gb', 'hours_left']
    records = read_scalars(tmp_path / 'work')
    assert len(records) == 4  # two epochs of six steps
    for record in records:
        assert set(names) <= set(record)
        assert record['images_per_s'] == pytest.approx(4 / record['time'])
        assert 0 <= record['data_wait'] <= 1 and record['peak_memory_gb'] > 0.1
    flops = {record['mfu'] * 1e9 / record['images_per_s'] for record in records}
    assert max(flops) == pytest.approx(min(flops))  # of an image
    assert [record['hours_left'] > 0 for record in records] == [True, True, True, False]

    (log,) = (tmp_path / 'work').glob('*/*.log')
    lines = [line for line in log.read_text().splitlines() if 'Epoch(train)' in line]
    assert len(lines) == 4 and all(f'{name}: ' in line for name in names for line in lines)
    (events,) = (tmp_path / 'work').glob('*/vis_data/events*')
    accumulator = EventAccumulator(str(events)).Reload()
    for name in names:
        assert [event.value for event in accumulator.Scalars(name)] == pytest.approx([r[name] for r in records])


def test_no_peak_no_mfu(tiny_config, run_tool, tmp_path):
    run_tool('train.py', tiny_config({'train_cfg.max_epochs': 1, 'train_dataloader.num_workers': 0}))
    assert all('mfu' not in record and 'images_per_s' in record for record in read_scalars(tmp_path / 'work'))


def test_counting_leaves_the_run_as_it_is(tiny_config, run_tool, tmp_path):
    """Also with accumulated gradients, and with a batch of more images than are counted."""
    losses, flops = [], []
    for accumulative_counts, hooks in ((1, False), (1, True), (2, True), (2, False)):
        hooks = [dict(type='mmmilan.ThroughputHook', peak_tflops=0.001)] if hooks else []
        changes = {'custom_hooks': [dict(type='mmmilan.StepSeedHook'), *hooks], 'train_dataloader.num_workers': 0}
        changes |= {'train_dataloader.batch_size': 8, 'optim_wrapper.accumulative_counts': accumulative_counts}
        changes |= {'train_cfg.max_epochs': 1, 'param_scheduler': None}
        work_dir = tmp_path / f'{len(losses)}'
        run_tool('train.py', tiny_config(changes | {'work_dir': str(work_dir)}))
        records = read_scalars(work_dir)
        losses.append([record['loss'] for record in records])
        flops += [record['mfu'] * 1e9 / record['images_per_s'] for record in records if 'mfu' in record][:1]
    assert losses[0] == losses[1] and losses[2] == losses[3] and losses[0] != losses[2]
    assert flops[0] == pytest.approx(flops[1], rel=1e-6)


def test_losses_are_fetched_together():
    """That is when a line of the log is due, or the epoch ends."""
    hub = MessageHub('losses')
    runner = SimpleNamespace(hooks=[LoggerHook(interval=3)], message_hub=hub, train_dataloader=[None] * 7)
    hook, loss = DeferredRuntimeInfoHook(), torch.zeros(())
    for i in range(7):
        loss += 1  # in place, as a CUDA graph would
        hook.after_train_iter(runner, i, None, dict(loss=loss))
        fetched = hub.log_scalars['train/loss'].data[0].tolist() if 'train/loss' in hub.log_scalars else []
        assert fetched == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0][: (0, 0, 3, 3, 3, 6, 7)[i]]
