"""The speed in the log is right, and measuring it changes nothing."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import read_scalars
from mmmilan.engine import DeferredRuntimeInfoHook, OnlineEvaluationHook
from mmmilan.engine.throughput import counted_flops, evaluations_left, peak_tflops
from mmmilan.registry import MODELS


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


@pytest.mark.parametrize('end, interval, begin', [(10, 3, 1), (10, 5, 1), (4, 7, 1), (10, 2, 5), (1, 1, 1), (3, 1, 9)])
def test_evaluations_to_come(end, interval, begin):
    """As MMEngine's loops run them."""
    due = [step for step in range(1, end + 1) if step >= begin and (step % interval == 0 or step == end)]
    for done in range(end + 1):
        assert evaluations_left(done, end, interval, begin) == len([step for step in due if step > done])


@pytest.mark.slow
def test_the_time_left_has_the_evaluations(tiny_config, run_tool, tmp_path, monkeypatch, image_folder):
    monkeypatch.setattr(OnlineEvaluationHook, 'measure', lambda *_: time.sleep(1.1) or {})
    dataset = dict(type='mmmilan.ImageFolder', data_root=str(image_folder), pipeline=[])
    hooks = [dict(type='mmmilan.ThroughputHook'), dict(type='mmmilan.OnlineEvaluationHook', dataset=dataset)]
    changes = {'custom_hooks': hooks, 'default_hooks.logger': dict(type='LoggerHook', interval=6)}
    run_tool('train.py', tiny_config(changes | {'train_dataloader.num_workers': 0}))
    first, last = (3600 * row['hours_left'] for row in read_scalars(tmp_path / 'work') if 'hours_left' in row)
    assert first > 2.2
    assert last == pytest.approx(1.1, abs=0.2)  # no step is left, but one evaluation
    (log,) = (tmp_path / 'work').glob('*/*.log')
    assert re.findall(r'Epoch\(train\).*eta: (\S+)', log.read_text())[-1] == '0:00:01'


def test_no_peak_no_mfu(tiny_config, run_tool, tmp_path):
    run_tool('train.py', tiny_config({'train_cfg.max_epochs': 1, 'train_dataloader.num_workers': 0}))
    assert all('mfu' not in record and 'images_per_s' in record for record in read_scalars(tmp_path / 'work'))


@pytest.mark.slow
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


def block_flops(tokens: int, width: int, hidden: int) -> int:
    """A transformer block: 4 projections, 2 products of attention, 2 layers of the FFN."""
    return 2 * tokens * (4 * width**2 + 2 * width * hidden) + 4 * tokens**2 * width


def counted(function, *args: object) -> int:
    with counted_flops() as counter:
        function(*args)
    return counter.get_total_flops()


def test_flops_of_the_encoder(milan_cfg):
    model = MODELS.build(milan_cfg)
    images, visible = torch.randn(2, 3, 64, 64), torch.arange(4).expand(2, -1)
    embedding = 2 * 4 * (3 * 16**2) * 48  # of the visible patches alone
    assert counted(model.backbone, images, visible) == 2 * (embedding + 2 * block_flops(5, 48, 192))
    backbone = MODELS.build(milan_cfg['backbone'])

    def forward_and_backward() -> None:
        backbone(images, visible).sum().backward()

    # the backward pass has two products for each, but one for the embedding, as images have no gradient; attention
    # computes its scores again: 5 products for 2
    expected = embedding * 2 + 2 * (3 * block_flops(5, 48, 192) + 2 * 5**2 * 48)
    assert counted(forward_and_backward) == 2 * expected


def test_flops_of_the_decoder(milan_cfg):
    model = MODELS.build(milan_cfg)
    order = torch.arange(16).expand(2, -1)
    width, hidden, prompts, masked = 32, 128, 5, 12
    block = 2 * masked * (2 * width**2 + 2 * width * hidden)  # queries, output projection, FFN
    block += 2 * (prompts + masked) * 2 * width**2  # keys and values
    block += 4 * masked * (prompts + masked) * width
    expected = 2 * prompts * 48 * width + 2 * block + 2 * (prompts + masked) * width * 24
    assert counted(model.neck, torch.randn(2, 5, 48), order[:, :4], order[:, 4:]) == 2 * expected


def test_flops_of_the_teacher(milan_cfg):
    teacher = MODELS.build(milan_cfg).head.teacher
    width, tokens = teacher.visual.conv1.out_channels, 17
    blocks = len(teacher.visual.transformer.resblocks)
    embedding = 2 * 16 * (3 * 16**2) * width
    # one row of attention: the class token's query, carried through the keys' weights, against all tokens
    heads = teacher.visual.transformer.resblocks[0].attn.num_heads
    importance = 2 * width**2 + 2 * width**2 + 2 * heads * tokens * width
    expected = embedding + blocks * block_flops(tokens, width, 4 * width) + 2 * tokens * width * 24 + importance
    assert counted(teacher, torch.randn(2, 3, 64, 64)) == 2 * expected


def test_peak_of_known_devices(monkeypatch):
    names = {
        'NVIDIA A100-SXM4-80GB': 312,
        'NVIDIA H100 PCIe': 756.5,
        'NVIDIA H100 80GB HBM3': 989.4,
        'NVIDIA H200 NVL': 835.5,
        'NVIDIA L4': 121,
        'NVIDIA L40': 181,
        'NVIDIA A40': 149.7,
        'NVIDIA GeForce RTX 5090': 209.5,
        'NVIDIA RTX A4000': None,
        'NVIDIA GeForce RTX 4090 Laptop GPU': None,
        'NVIDIA A100-SXM4-40GB MIG 3g.20gb': None,
        'Voodoo 2': None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert peak_tflops(torch.device('cuda'), torch.bfloat16) == peak, name
    assert peak_tflops(torch.device('cpu'), torch.bfloat16) is None
