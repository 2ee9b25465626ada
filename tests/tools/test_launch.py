"""Checks before a run starts, and the end of a run that cannot start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from helpers import ROOT
from mmmilan.engine import ImageSizeHook
from mmmilan.engine.config_check import check_data
from mmmilan.errors import InputError
from mmmilan.models import DenseViT, MILANViT
from processes import run_script

ARCH = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)


MISSING = [
    ('detection/mask-rcnn_vit-base-p16_milan-pre_1x_coco.py', 'train', 'data/coco', 'train_dataloader.dataset'),
    ('detection/mask-rcnn_vit-base-p16_milan-pre_1x_coco.py', 'test', 'data/coco', 'test_dataloader.dataset'),
    (
        'segmentation/upernet_vit-base-p16_milan-pre_160k_ade20k-512x512.py',
        'train',
        'data/ade/ADEChallengeData2016',
        'train_dataloader.dataset',
    ),
]


@pytest.mark.parametrize(('config', 'task', 'folder', 'option'), MISSING)
def test_missing_data_set(config, task, folder, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        check_data(Config.fromfile(ROOT / 'configs' / config), task)
    assert str(error.value) == (f'The data folder {folder} does not exist; set {option}.data_root to your data.')


def test_missing_annotations(tmp_path, monkeypatch):
    """First those of the data set, then those of the evaluator."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(ROOT / 'configs/detection/mask-rcnn_vit-base-p16_milan-pre_1x_coco.py')
    (tmp_path / 'coco/annotations').mkdir(parents=True)
    cfg.test_dataloader.dataset.data_root = 'coco'
    file = 'annotations/instances_val2017.json'
    with pytest.raises(InputError, match=f'The annotations coco/{file} do not exist; set test_dataloader.dataset.'):
        check_data(cfg, 'test')
    (tmp_path / 'coco' / file).touch()
    with pytest.raises(InputError, match=f'The annotations data/coco/{file} do not exist; set test_evaluator.ann_file'):
        check_data(cfg, 'test')
    cfg.test_evaluator.ann_file = f'coco/{file}'
    check_data(cfg, 'test')


def test_missing_labelled_images_of_knn(image_folder):
    cfg = Config.fromfile(ROOT / 'configs/milan/benchmarks/vit-base-p16_knn_in1k.py')
    cfg.test_dataloader.dataset.data_root = str(image_folder)
    with pytest.raises(InputError, match='data/imagenet/train does not exist; set test_cfg.bank_dataloader.dataset'):
        check_data(cfg, 'test')


def say_size(model: torch.nn.Module, inputs: object) -> list[str]:
    said: list[str] = []
    runner = SimpleNamespace(model=SimpleNamespace(backbone=model), logger=SimpleNamespace(warning=said.append))
    hook = ImageSizeHook()
    for i in range(3):
        hook.before_test_iter(runner, i, dict(inputs=inputs))
    return said


def test_image_size_that_is_not_the_encoders():
    encoder = MILANViT(arch=ARCH, img_size=64, patch_size=16)
    (message,) = say_size(encoder, [torch.zeros(3, 224, 224)])  # once
    assert message.startswith('The images are (224, 224) but img_size=(64, 64): positions are interpolated; make ')
    assert not say_size(encoder, torch.zeros(2, 3, 64, 64))
    dense = DenseViT(arch=ARCH, img_size=64, patch_size=16, out_indices=(0, 1, 2, 3))
    assert not say_size(dense, [torch.zeros(3, 224, 224)])


IMPORTED = """
import atexit


class Witness:
    def __del__(self):
        print('freed')


witness = Witness()
atexit.register(print, 'registered for the exit')
"""


@pytest.mark.slow
def test_a_launched_process_ends_without_freeing_its_modules(tiny_config, tmp_path, monkeypatch):
    """Threads of gloo may still use them. Functions registered with atexit are called."""
    (tmp_path / 'imported.py').write_text(IMPORTED)
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{ROOT}')
    changes = dict(custom_imports=dict(imports=['imported'], allow_failed_imports=False))
    config = tiny_config(changes | {'train_cfg.max_epochs': 1, 'train_dataloader.num_workers': 0})
    output = run_script('dist_train.sh', config, 1)
    assert 'registered for the exit' in output and 'freed' not in output
    assert (tmp_path / 'work/epoch_1.pth').exists()
