"""A training run that takes milliseconds, in one process or in several."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmmilan.engine.distributed import end_processes, init_processes
from mmmilan.engine.hooks import ExactLoadingHook


class Numbers(Dataset):
    metainfo: dict = {}

    def __init__(self, length: int = 4) -> None:
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((3,), float(index))


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, *inputs, mode):
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


def runner(work_dir: Path, epochs: int = 2, length: int = 4, **kwargs) -> Runner:
    """``length / 2`` steps an epoch, by our hooks; arguments of MMEngine's ``Runner`` besides."""
    torch.manual_seed(0)
    model = kwargs.pop('model', None) or Model()
    checkpoint = dict(type='mmmilan.CheckpointHook', interval=1, **kwargs.pop('checkpoint', {}))
    settings = dict(
        train_dataloader=dict(
            dataset=Numbers(length),
            batch_size=2,
            num_workers=kwargs.pop('num_workers', 0),
            sampler=dict(type='DefaultSampler', shuffle=True, seed=0),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01, fused=True)),
        param_scheduler=[dict(type='CosineAnnealingLR', T_max=4)],
        default_hooks=dict(checkpoint=checkpoint),
    )
    name = os.urandom(8).hex()  # or two runners of one process would share their message hub
    built = Runner(model, str(work_dir), experiment_name=name, log_level='ERROR', **settings | kwargs)
    built.register_hook(ExactLoadingHook())
    return built


def start_ranks(target: Callable, *args: object, launcher: bool = True) -> list[multiprocessing.Process]:
    """Two ranks of gloo that call ``target`` with ``launcher`` and ``cfg`` for :func:`runner` besides.

    They meet at a store of this process, as at that of torchrun, or at one of process 0, as under Slurm.
    """
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not launcher:
        del store
    ranks = []
    for rank in '01':
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        environment['TORCHELASTIC_USE_AGENT_STORE'] = str(launcher)
        process = multiprocessing.get_context('fork').Process(
            target=be_rank, args=(environment, target, *args), daemon=True
        )
        process.start()
        process.store = store if launcher else None  # for as long as it lives
        ranks.append(process)
    return ranks


def be_rank(environment: dict[str, str], target: Callable, *args: object) -> None:
    os.environ.update(environment)
    cfg = Config(dict(launcher='pytorch'))
    init_processes(cfg)
    target(*args, launcher='pytorch', cfg=cfg)
    end_processes()


def exit_codes(ranks: list[multiprocessing.Process], seconds: float = 60) -> list[int | None]:
    """How the processes ended; None for one that had to be killed after some seconds."""
    for rank in ranks:
        rank.join(seconds)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes
