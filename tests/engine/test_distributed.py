"""Rates, samples and seeds of sixteen processes in PyTorch's fake process group; and training on many processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers import ROOT, assert_same_weights, load_trusted
from mmmilan.datasets import ReproducibleSampler
from mmmilan.engine import GradientCompressionHook, StepSeedHook
from mmmilan.engine.distributed import init_processes
from processes import free_port

WORLD = 16


@contextmanager
def process(rank: int) -> Iterator[None]:
    """One of sixteen processes, without communication."""
    dist.init_process_group('fake', store=FakeStore(), rank=rank, world_size=WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_each_sample_once():
    epochs = []
    for epoch in range(2):
        indices = []
        for rank in range(WORLD):
            with process(rank):
                sampler = ReproducibleSampler(range(1600), shuffle=True, seed=5)
                sampler.set_epoch(epoch)
                own = [draw.index for draw in sampler]
                assert len(own) == len(sampler) == 100
                indices += own
        assert sorted(indices) == list(range(1600))
        epochs.append(indices)
    assert epochs[0] != epochs[1]


def test_every_process_has_its_own_random_numbers():
    numbers = []
    for iteration in (7, 8):
        for rank in range(WORLD):
            with process(rank):
                StepSeedHook().before_train_iter(SimpleNamespace(seed=3, iter=iteration), 0)
                numbers.append(torch.rand(1).item())
    assert len(set(numbers)) == 2 * WORLD


@pytest.mark.parametrize(('batch_size', 'factor'), [(256, 1.0), (128, 0.5)])
def test_learning_rate(batch_size, factor):
    """The recipe's rate at its 16 x 256 images, in proportion at other numbers."""
    cfg = Config.fromfile(ROOT / 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py')
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    runner = SimpleNamespace(logger=SimpleNamespace(info=lambda *args: None), param_schedulers=None)
    runner._train_dataloader = dict(batch_size=batch_size)
    with process(3):
        runner._world_size = runner.world_size = dist.get_world_size()
        Runner.scale_lr(runner, OptimWrapper(optimizer), cfg.auto_scale_lr | dict(enable=True))
    assert optimizer.param_groups[0]['lr'] == pytest.approx(2.4e-3 * factor)


def test_wrapper():
    cfg = Config(dict(launcher='none'))
    init_processes(cfg)
    assert 'model_wrapper_cfg' not in cfg
    cfg = Config(dict(launcher='slurm'))
    init_processes(cfg)
    wrapper = cfg.model_wrapper_cfg
    assert wrapper.gradient_as_bucket_view and not wrapper.broadcast_buffers and not wrapper.find_unused_parameters


def averaged_gradient(compress: bool) -> Tensor:
    """The gradient that DDP averages. The model is freed here: after its process group it may hang (PyTorch 2.11)."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(7, 3), gradient_as_bucket_view=True)
    if compress:
        GradientCompressionHook().before_train(SimpleNamespace(model=model))
    model(torch.randn(5, 7)).square().sum().backward()
    return model.module.weight.grad.clone()


def test_compressed_gradients():
    """Gradients are sent in bfloat16 and arrive in float32."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, compressed = averaged_gradient(compress=False), averaged_gradient(compress=True)
    finally:
        dist.destroy_process_group()
    assert not torch.equal(plain, compressed) and torch.equal(compressed, plain.bfloat16().float())


@pytest.fixture
def images(image_folder, tmp_path):
    """32 images, which 16 processes share evenly."""
    folder = tmp_path / 'images'
    shutil.copytree(image_folder, folder)
    for path in sorted(folder.rglob('*.jpg'))[:8]:
        shutil.copy(path, path.with_name(f'again_{path.name}'))
    return folder


@pytest.mark.slow
def test_many_processes_are_one(tiny_config, run_tool, images, tmp_path):
    """Two launchers, as on two machines, of two processes: the weights are those of one with the whole batch."""
    mask = dict(type='SimMIMMaskGenerator', input_size=64, mask_patch_size=16, model_patch_size=16, mask_ratio=0.75)
    pipeline = Config.fromfile(tiny_config()).to_dict()['train_dataloader']['dataset']['pipeline']
    pipeline = [pipeline[0], mask, dict(type='PackInputs')]  # whose masks depend on the image alone
    changes = {'train_dataloader.num_workers': 0, 'train_dataloader.batch_size': 16}
    # in bfloat16 each process would round its part of a gradient, and AdamW scales up what rounding leaves
    changes['optim_wrapper.type'] = 'OptimWrapper'
    changes['optim_wrapper.optimizer'] = dict(_delete_=True, type='SGD', lr=0.1, weight_decay=0.05)
    changes |= {'train_dataloader.dataset.data_root': str(images), 'train_dataloader.dataset.pipeline': pipeline}
    run_tool('train.py', tiny_config(changes | {'work_dir': str(tmp_path / 'one')}))

    config = tiny_config(changes | {'train_dataloader.batch_size': 4})
    environment = os.environ | dict(OMP_NUM_THREADS='1', PORT=str(free_port()), NNODES='2', MASTER_ADDR='127.0.0.1')
    environment['PATH'] = f'{os.path.dirname(sys.executable)}:{environment["PATH"]}'
    command = ['bash', ROOT / 'tools/dist_train.sh', config, '2']
    nodes = [subprocess.Popen(command, env=environment | dict(NODE_RANK=str(rank))) for rank in range(2)]
    assert [node.wait() for node in nodes] == [0, 0]
    actual, expected = (load_trusted(tmp_path / folder / 'epoch_2.pth') for folder in ('work', 'one'))
    assert actual['meta']['iter'] == expected['meta']['iter'] == 4
    assert_same_weights(actual['state_dict'], expected['state_dict'])
