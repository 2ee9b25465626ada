"""A training run that takes milliseconds."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

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
    built = Runner(Model(), str(work_dir), experiment_name=name, log_level='ERROR', **settings | kwargs)
    built.register_hook(ExactLoadingHook())
    return built
