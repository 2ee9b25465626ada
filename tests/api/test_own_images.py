"""Every command of docs/own_images.md runs, in the order of the guide, on a few small images."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import VISBACKENDS

import mmmilan
from helpers import ROOT, real_data
from mmmilan import cli
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.errors import InputError

GUIDE = (ROOT / 'docs/own_images.md').read_text(encoding='utf-8')
HERE = ['num_workers 0', 'persistent_workers False']
# Options that let a command of the guide run in seconds, by how the command begins.
SMALLER = {
    'mmmilan pretrain': '--arch tiny --teacher clip.pt --epochs 1 --img-size 64 --batch-size 8 '
    '--model.neck.decoder_depth 1 --train_dataloader.num_workers 0 --test_dataloader.num_workers 0 '
    '--train_dataloader.persistent_workers False',
    'mmmilan embed': '--num-workers 0',
    'mmmilan predict': '--num-workers 0',
    'mmmilan finetune': '--epochs 1 --batch-size 8 '
    + ' '.join(f'--{name}_dataloader.{option}' for name in ('train', 'val', 'test') for option in HERE),
}


def blocks(language: str) -> list[str]:
    """The code blocks in a language in the guide."""
    return re.findall(rf'```{language}\n(.*?)```', GUIDE, re.S)


@pytest.fixture
def reader(image_folder, clip_file, tmp_path, monkeypatch) -> Path:
    """A checkout with the reader's images beside it."""
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    for folder in ('photos', 'my_images/train', 'my_images/val'):
        shutil.copytree(image_folder, tmp_path / folder)
    for name in ('a.jpg', 'b.jpg'):
        shutil.copy(next(image_folder.rglob('*.jpg')), tmp_path / name)
    torch.save(timm.create_model('deit_tiny_patch16_224').state_dict(), tmp_path / 'start.pth')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command(reader, monkeypatch):
    for line in '\n'.join(blocks('bash')).splitlines():
        line = line.partition('#')[0].replace('milan_vit-base-p16_16xb256-amp-coslr-400e_in1k', 'start.pth')
        words = shlex.split(line.removeprefix('export '))
        settings = list(itertools.takewhile(lambda word: re.match(r'[A-Z_]+=', word), words))
        for name, _, value in (setting.partition('=') for setting in settings):
            monkeypatch.setenv(name, value)
        words = words[len(settings) :]
        if not words:
            continue
        command = ' '.join(words)
        words += shlex.split(next((more for start, more in SMALLER.items() if command.startswith(start)), ''))
        cli.main(words[1:])

    for name in ('report.html', 'config.py', 'last_checkpoint'):
        assert (reader / 'runs/photos' / name).is_file()
    assert 'class="verdict">Pretraining' in (reader / 'report.html').read_text()
    with np.load('photos.npz') as file:
        assert file['class_token'].shape == (24, 192) and file['ok'].all()
    assert (reader / 'photos.onnx').is_file() and (reader / 'mine.onnx').is_file()
    assert len((reader / 'predictions/predictions.csv').read_text().splitlines()) == 1 + 24
    vit = timm.create_model('deit_tiny_patch16_224', img_size=64, num_classes=0)
    vit.load_state_dict(load_checkpoint_file('photos.safetensors')['state_dict'])
    assert 'Pretraining ' in json.loads(Path('runs/mine/comparison.json').read_text())['sentence']
    assert 'head.fc.weight' in load_checkpoint_file('runs/probe/model.pth')['state_dict']

    values: dict = {}
    for code in blocks('python'):
        exec(code, values)
    assert values['features'].shape == (2, 192)


def test_backends_of_the_guide():
    """The line for Weights & Biases is read as two backends that MMEngine has, and so is that for MLflow."""
    words = shlex.split(re.search(r'`(--visualizer.vis_backends .*?)`', GUIDE)[1])
    others, given, changes = cli.split_tokens(['my_images', 'runs/mine', *words], mmmilan.finetune)
    assert others == ['my_images', 'runs/mine'] and not given
    assert changes == {'visualizer.vis_backends': [dict(type='LocalVisBackend'), dict(type='WandbVisBackend')]}
    assert '`MLflowVisBackend`' in GUIDE
    assert all(VISBACKENDS.get(name) for name in ('LocalVisBackend', 'WandbVisBackend', 'MLflowVisBackend'))


@pytest.mark.data
def test_real_folders(tmp_path, monkeypatch):
    """Task and classes are read off COCO's and ADE20K's images, and a short training ends with a page."""
    from mmseg.datasets import ADE20KDataset

    coco, ade20k = real_data('coco128'), real_data('ade20k_sample')
    monkeypatch.chdir(tmp_path)
    small = ['--epochs', '1', '--img-size', '32', '--arch']
    small += ['dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)']
    with pytest.raises(InputError, match="has labels for detection and segmentation; choose with task='detection'"):
        mmmilan.finetune(coco, 'none')
    Path('objects').mkdir()  # the training images alone, of which a fifth validates
    for name in ('annotations/instances_train2017.json', 'train2017'):
        Path('objects', Path(name).name).symlink_to(coco / name)
    Path('names.txt').write_text('\n'.join(ADE20KDataset.METAINFO['classes']))
    cases = dict(objects=('detection', 80, ['--batch-size', '4']))
    cases['scenes'] = 'segmentation', 150, ['--batch-size', '2', '--classes', 'names.txt', '--ignore', '0']
    for name, (task, number, options) in cases.items():
        data = ade20k if name == 'scenes' else name
        cli.main(['finetune', str(data), f'runs/{name}', *small, *options])
        predictor = mmmilan.Predictor(f'runs/{name}/model.pth')
        assert predictor.task == task and len(predictor.classes) == number
        assert 'class="verdict">' in Path(f'runs/{name}/report.html').read_text()
