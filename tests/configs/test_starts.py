"""PRETRAIN, an environment variable: where a downstream config starts, and the folder of its run."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from mmengine.config import Config

from helpers import ROOT
from mmmilan.checkpoints.zoo import resolve_checkpoint
from mmmilan.engine.launch import read_config
from mmmilan.errors import InputError

SLIP = 'milan-slip_vit-base-p16_16xb256-amp-coslr-400e_in1k'
FINE_TUNING = ROOT / 'configs/milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'


def read(path, **options) -> Config:
    return read_config(
        Namespace(config=str(path), **dict(launcher='none', local_rank=0, cfg_options=None, work_dir=None) | options)
    )


def test_the_run_has_a_folder_of_its_own(monkeypatch):
    assert read(FINE_TUNING).work_dir == f'work_dirs/{FINE_TUNING.stem}'
    monkeypatch.setenv('PRETRAIN', SLIP)
    cfg = read(FINE_TUNING)
    assert cfg.model.backbone.init_cfg.checkpoint == SLIP
    assert cfg.work_dir == f'work_dirs/{FINE_TUNING.stem}/{SLIP}'
    assert read(FINE_TUNING, work_dir='elsewhere').work_dir == 'elsewhere'
    pretraining = ROOT / f'configs/milan/ablations/{SLIP}.py'  # starts from no checkpoint
    assert read(pretraining).work_dir == f'work_dirs/{SLIP}'
    monkeypatch.setenv('PRETRAIN', '/runs/vit/epoch_9.pth')
    assert read(FINE_TUNING).work_dir == f'work_dirs/{FINE_TUNING.stem}/_runs_vit_epoch_9.pth'


def test_the_name_of_a_config_is_its_newest_checkpoint(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'work_dirs/{SLIP} has no checkpoint; choose one of milan_vit'):
        resolve_checkpoint(SLIP)
    folder = tmp_path / 'work_dirs' / SLIP
    folder.mkdir(parents=True)
    torch.save(dict(meta=dict(iter=400)), folder / 'epoch_400.pth')
    (folder / 'last_checkpoint').write_text('')  # of a run that was killed by MMEngine's own hook
    assert resolve_checkpoint(SLIP).samefile(folder / 'epoch_400.pth')


def test_a_model_of_the_zoo_without_weights(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match='No weights of milan_vit-large.* have been published and work_dirs/milan_vit-l'
    ):
        resolve_checkpoint('milan_vit-large-p16_16xb256-amp-coslr-400e_in1k')
