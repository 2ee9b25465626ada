"""A training run that takes milliseconds, in one process or in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing import Process
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmmilan.engine.distributed import end_processes, init_processes
from mmmilan.engine.resuming import ExactLoadingHook
from processes import start_ranks


class Numbers(Dataset):
    metainfo: dict = {}

    def __init__(self, length: int = 4, names: Sequence[str] = ()) -> None:
        self.length = length
        self.names = names

    def get_data_info(self, index):
        return dict(img_path=self.names[index]) if self.names else {}

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
            dataset=Numbers(length, kwargs.pop('names', ())),
            batch_size=kwargs.pop('batch_size', 2),
            num_workers=kwargs.pop('num_workers', 0),
            sampler=kwargs.pop('sampler', dict(type='DefaultSampler', shuffle=True, seed=0)),
        ),
        train_cfg=kwargs.pop('train_cfg', dict(type='mmmilan.EpochLoop', max_epochs=epochs)),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01, fused=True)),
        param_scheduler=[dict(type='CosineAnnealingLR', T_max=4)],
        default_hooks=dict(checkpoint=checkpoint),
        randomness=dict(seed=None),  # MMEngine changes its default in place
    )
    name = os.urandom(8).hex()  # or two runners of one process would share their message hub
    built = Runner(model, str(work_dir), experiment_name=name, log_level='ERROR', **settings | kwargs)
    built.register_hook(ExactLoadingHook())
    return built


def start_run(target: Callable, *args: object, launcher: bool = True) -> list[Process]:
    """Two ranks that call ``target`` with ``launcher`` and ``cfg`` for :func:`runner` besides."""
    return start_ranks(be_rank, target, args, launcher=launcher)


def be_rank(target: Callable, args: tuple) -> None:
    cfg = Config(dict(launcher='pytorch'))
    init_processes(cfg)
    target(*args, launcher='pytorch', cfg=cfg)
    end_processes()
