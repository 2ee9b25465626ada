"""The configs for one's own images, set by environment variables as in the README."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.config import Config

from helpers import ROOT, read_metrics, read_scalars, real_data
from mmmilan.checkpoints.io import load_checkpoint_file

CONFIG = ROOT / 'configs/milan/milan_vit-base-p16_custom.py'
# A smaller encoder, decoder and teacher than the config's, so that a test can train them.
SMALL = (
    'model.backbone.arch=deit-tiny model.neck.embed_dim=192 '
    'model.neck.decoder_depth=1 model.neck.predict_feature_dim=24'
)


@pytest.mark.parametrize('epochs', [1, 2, 50])
def test_three_things_to_set(monkeypatch, epochs):
    monkeypatch.setenv('DATA_ROOT', '/data/mine')
    monkeypatch.setenv('BATCH_SIZE', '96')
    monkeypatch.setenv('EPOCHS', str(epochs))
    cfg = Config.fromfile(CONFIG)
    assert cfg.train_dataloader.dataset.data_root == '/data/mine'
    assert cfg.train_dataloader.batch_size == 96
    assert cfg.train_cfg.max_epochs == epochs
    warmup, cosine = cfg.param_scheduler
    assert warmup.end == cosine.begin == max(1, epochs // 10)
    assert cosine.end >= epochs and cosine.begin < cosine.end


def test_training_starts_from_a_given_vit(run_tool, image_folder, clip_file, tmp_path, monkeypatch):
    torch.manual_seed(1)
    vit = timm.create_model('deit_tiny_patch16_224')
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    for key, value in dict(DATA_ROOT=image_folder, BATCH_SIZE=8, EPOCHS=1, CHECKPOINT=tmp_path / 'vit.pth').items():
        monkeypatch.setenv(key, str(value))
    teacher = (
        f'model.head.teacher.model=None model.head.teacher.pretrained={clip_file} model.head.teacher.input_size=224'
    )
    quick = 'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False default_hooks.logger.interval=1'
    options = f'{SMALL} {teacher} {quick} optim_wrapper.type=OptimWrapper'.split()
    run_tool('train.py', CONFIG, '--work-dir', tmp_path / 'work', '--cfg-options', *options)

    steps = read_scalars(tmp_path / 'work')
    assert len(steps) == 3  # 24 images
    assert max(step['lr'] for step in steps) <= 2.4e-3 * 8 / 4096 * 1.001
    weights = load_checkpoint_file(tmp_path / 'work/epoch_1.pth')['state_dict']
    before, after = vit.blocks[0].mlp.fc1.weight, weights['backbone.layers.0.ffn.layers.0.0.weight']
    assert 0 < (before - after).abs().max() < 1e-4  # three small steps away
    assert torch.equal(vit.pos_embed, weights['backbone.pos_embed'])


@pytest.fixture
def labelled(image_folder, tmp_path):
    """Folders train/ and val/ of the same three classes."""
    for split in ('train', 'val'):
        shutil.copytree(image_folder, tmp_path / 'labelled' / split)
    return tmp_path / 'labelled'


@pytest.fixture
def own_encoder(tmp_path):
    torch.manual_seed(1)
    torch.save(timm.create_model('deit_tiny_patch16_224').state_dict(), tmp_path / 'vit.pth')
    return tmp_path / 'vit.pth'


BENCHMARKS = ROOT / 'configs/milan/benchmarks'
HERE = ['num_workers=0', 'persistent_workers=False']


def test_nearest_neighbours_on_ones_own_folder(labelled, own_encoder, run_tool, tmp_path, monkeypatch):
    for key, value in dict(DATA_ROOT=labelled, ARCH='tiny').items():
        monkeypatch.setenv(key, str(value))
    workers = [
        'test_dataloader.persistent_workers=False',
        'test_dataloader.num_workers=0',
        'test_cfg.bank_dataloader.num_workers=0',
        'test_cfg.k=1',
    ]
    command = (BENCHMARKS / 'vit-base-p16_knn_custom.py', own_encoder, '--work-dir', tmp_path / 'knn')
    run_tool('test.py', *command, '--cfg-options', *workers)
    assert (
        read_metrics(tmp_path / 'knn')['accuracy/top1'] == 100
    )  # val has the same images: the nearest is the image itself


@pytest.mark.slow
def test_linear_probe_on_ones_own_folder(labelled, own_encoder, run_tool, tmp_path, monkeypatch):
    values = dict(DATA_ROOT=labelled, ARCH='tiny', CLASSES=3, PRETRAIN=own_encoder, BATCH_SIZE=8, EPOCHS=1)
    for key, value in values.items():
        monkeypatch.setenv(key, str(value))
    loaders = [f'{loader}.{option}' for loader in ('train_dataloader', 'val_dataloader') for option in HERE]
    options = ['--cfg-options', *loaders, 'optim_wrapper.type=OptimWrapper']
    run_tool('train.py', BENCHMARKS / 'vit-base-p16_linear_custom.py', '--work-dir', tmp_path / 'work', *options)
    weights = load_checkpoint_file(tmp_path / 'work/epoch_1.pth')['state_dict']
    before = timm.create_model('deit_tiny_patch16_224')
    before.load_state_dict(torch.load(own_encoder))
    for number in (0, 11):  # frozen, all of it
        expected = before.blocks[number].mlp.fc1.weight
        assert torch.equal(weights[f'backbone.layers.{number}.ffn.layers.0.0.weight'], expected)
    assert weights['head.layers.head.weight'].shape == (3, 192)


def test_from_scratch(monkeypatch):
    monkeypatch.setenv('CHECKPOINT', 'None')
    assert Config.fromfile(CONFIG).model.backbone.init_cfg is None


# -- CIFAR-10


@pytest.fixture
def cifar10(tmp_path) -> Path:
    """24 + 8 images of each class of the test split, which comes first in the archive."""
    archive = real_data('cifar10.tar.xz')
    with tarfile.open(archive, 'r|xz') as files:
        for member in files:
            _, split, label, name = PurePosixPath(member.name).parts
            if split != 'test':
                break
            if (number := int(Path(name).stem)) < 32:
                path = tmp_path / 'cifar10' / ('train' if number < 24 else 'val') / label / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files.extractfile(member).read())
    return tmp_path / 'cifar10'


@pytest.mark.data
def test_fine_tuning_on_cifar10(cifar10, benchmark_config, tiny_config, run_tool, tmp_path, monkeypatch):
    """Pretrain by tools/train.py, fine-tune from the file that it wrote, evaluate by tools/test.py."""
    pretraining = {'train_dataloader.dataset.data_root': str(cifar10), 'train_dataloader.batch_size': 64}
    quick = {'train_dataloader.num_workers': 0, 'train_cfg.max_epochs': 1, 'optim_wrapper.type': 'OptimWrapper'}
    run_tool('train.py', tiny_config(pretraining | quick | dict(param_scheduler=None)), '--work-dir', tmp_path / 'pre')
    checkpoint = tmp_path / 'pre/epoch_1.pth'

    for key, value in dict(DATA_ROOT=cifar10, CLASSES=10, BATCH_SIZE=32, EPOCHS=10).items():
        monkeypatch.setenv(key, str(value))
    steps = [dict(type='mmmilan.LoadImage'), dict(type='Resize', scale=(64, 64)), dict(type='RandomFlip', prob=0.5)]
    pipeline = [*steps, dict(type='PackInputs')]  # so short a run needs no further augmentation
    config = benchmark_config('vit-base-p16_milan-pre_custom.py', {'train_dataloader.dataset.pipeline': pipeline})
    options = [
        'train_dataloader.batch_size=32',
        'val_dataloader.batch_size=32',
        'train_cfg.val_interval=10',
        'default_hooks.checkpoint.interval=10',
        f'model.backbone.init_cfg.checkpoint={checkpoint}',
        'model.train_cfg.augments=None',
        'optim_wrapper.optimizer.lr=0.1',  # for a batch of 1024
    ]
    run_tool('train.py', config, '--cfg-options', *options)
    records = read_scalars(tmp_path / 'work')
    losses = [record['loss'] for record in records if 'loss' in record]
    assert len(losses) == 10 * 7  # 240 images in batches of 32
    assert losses[0] == pytest.approx(np.log(10), abs=0.05)
    assert np.mean(losses[-7:]) < np.mean(losses[:7]) - 0.1
    accuracies = [record['accuracy/top1'] for record in records if 'accuracy/top1' in record]
    assert len(accuracies) == 1

    before = load_checkpoint_file(checkpoint)['state_dict']
    after = load_checkpoint_file(tmp_path / 'work/epoch_10.pth')['state_dict']
    key = 'backbone.layers.0.ffn.layers.0.0.weight'
    assert 0.5 < F.cosine_similarity(before[key].flatten(), after[key].flatten(), dim=0) < 0.9999  # it started there

    run_tool('test.py', config, tmp_path / 'work/epoch_10.pth', '--work-dir', tmp_path / 'test')
    assert read_metrics(tmp_path / 'test')['accuracy/top1'] == pytest.approx(accuracies[-1], abs=1e-3)
