"""PRETRAIN, an environment variable: where a downstream config starts, and the folder of its run."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config

from helpers import FINE_TUNED, PRETRAINED, ROOT, rest_slow
from mmmilan.checkpoints.zoo import resolve_checkpoint
from mmmilan.engine.launch import read_config
from mmmilan.errors import InputError

SLIP = 'milan-slip_vit-base-p16_16xb256-amp-coslr-400e_in1k'
FINE_TUNING = ROOT / 'configs/milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'


def read(path, **options) -> Config:
    return read_config(path, **options)


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


DOWNSTREAM = sorted(
    path
    for folder in ('detection', 'segmentation', 'milan/benchmarks', 'maskclip/benchmarks')
    for path in (ROOT / 'configs' / folder).glob('*.py')
    if not any(word in path.name for word in ('_imagenet-', '_knn_', '_retrieval_', '_zero-shot_'))  # only tested
)


OTHERS = {'_clip-pre': 'https://openaipublic', '_slip-pre': 'https://dl.fbaipublicfiles.com/slip/slip_base_25ep.pt'}


QUICK = [path for path in DOWNSTREAM if 'mask-rcnn' not in path.name]  # mmdet's bases take a second to parse


@pytest.mark.parametrize('path', rest_slow(DOWNSTREAM, *QUICK), ids=lambda path: path.stem)
def test_every_downstream_config_starts_where_it_is_told(path, monkeypatch):
    """With PRETRAIN from there, without it from the checkpoint in the config's name."""
    for name in ('CLASSES', 'DATA_ROOT'):  # of configs for own images
        monkeypatch.setenv(name, '3')
    default = Config.fromfile(path).model.backbone.init_cfg.checkpoint
    method = 'maskclip' if 'maskclip-pre' in path.name else 'milan'
    name = f'{method}_vit-{"large" if "large" in path.name else "base"}'
    other = next((url for kind, url in OTHERS.items() if kind in path.name), None)
    assert default.startswith(other or name)
    monkeypatch.setenv('PRETRAIN', '/runs/mine.pth')
    cfg = read(path)
    assert cfg.model.backbone.init_cfg.checkpoint == '/runs/mine.pth'
    assert cfg.work_dir == f'work_dirs/{path.stem}/_runs_mine.pth'


def save_run(folder, epochs: int, max_epochs: int) -> None:
    """The last checkpoint of a run, as far as its name and progress go."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = f'train_cfg = dict(by_epoch=True, max_epochs={max_epochs})'
    torch.save(dict(meta=dict(iter=10 * epochs, epoch=epochs, cfg=cfg)), folder / f'epoch_{epochs}.pth')


@pytest.mark.parametrize('name', [PRETRAINED, FINE_TUNED, SLIP])
def test_a_name_means_ones_own_finished_run_first(name, monkeypatch, tmp_path, log):
    """An unfinished one is refused, by a sentence that names both choices."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mmmilan.checkpoints.download.download', lambda url, sha256: tmp_path / 'published.pth')
    if name != SLIP:
        assert resolve_checkpoint(name) == tmp_path / 'published.pth' and 'the published file' in log.text
    save_run(tmp_path / 'work_dirs' / name, 3, 400)
    other = r'https://download\S+ for the published file' if name != SLIP else r'give work_dirs/\S+epoch_3\.pth'
    with pytest.raises(InputError, match=rf'not finished \(epoch 3 of 400\); finish it with --resume, or .*{other}'):
        resolve_checkpoint(name)
    save_run(tmp_path / 'work_dirs' / name, 400, 400)
    assert resolve_checkpoint(name).name == 'epoch_400.pth' and 'the end of your own run' in log.text


def test_the_name_of_a_config_is_its_newest_checkpoint(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'No weights of {SLIP} have been published and work_dirs/{SLIP} has none'):
        resolve_checkpoint(SLIP)
    with pytest.raises(InputError, match='work_dirs/milan-slp has no checkpoint; choose one of .*, such as milan_'):
        resolve_checkpoint('milan-slp')
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
