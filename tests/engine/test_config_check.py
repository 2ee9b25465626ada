"""Mistakes in what a config says of batches and loggers are found before training."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from faults.small_runs import Model, runner
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmmilan.engine.config_check import (
    PACKAGES,
    check_batches,
    check_data_sets,
    check_loops,
    check_packages,
    norm_of_images,
)
from mmmilan.errors import InputError


class Normed(Model):
    """A model with a norm between its layers, as ClsBatchNormNeck."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.neck = norm or nn.BatchNorm1d(3, affine=False)

    def forward(self, *inputs, mode):
        return dict(loss=self.layer(self.neck(torch.stack(inputs))).square().mean())


INFINITE = dict(sampler=dict(type='InfiniteSampler', seed=0), train_cfg=dict(type='IterBasedTrainLoop', max_iters=3))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(batch_size=1), r'train_dataloader.batch_size is 1, but neck is a BatchNorm over'),
        (dict(batch_size=1, **INFINITE), r'train_dataloader.batch_size is 1'),
        (dict(length=5), r'The last batch of an epoch has one image \(5 in batches of 2\), but neck is a BatchNorm'),
        (dict(length=9, batch_size=4), r'The last batch .* set train_dataloader.drop_last=True'),
        (dict(length=1), 'The last batch'),
        (dict(length=4), ''),
        (dict(length=5, **INFINITE), ''),
        (dict(length=9, train_cfg=dict(type='IterBasedTrainLoop', max_iters=4)), ''),  # never gets there
    ],
)
def test_a_batch_of_one_before_batch_norm(options, message, tmp_path):
    """A refused run would have failed, and no other does."""
    run = runner(tmp_path, epochs=1, model=Normed(), **options)
    if message:
        with pytest.raises(InputError, match=message):
            check_batches(run)
    else:
        check_batches(run)
    with pytest.raises(ValueError, match='more than 1 value') if message else torch.enable_grad():
        run.train()


def test_a_batch_of_one_without_batch_norm(tmp_path):
    check_batches(runner(tmp_path, batch_size=1, length=3, model=Normed(nn.LayerNorm(3))))


def test_norms_that_have_more_than_one_value(tmp_path):
    """BatchNorm of maps, and of a backbone's tokens, works with one image; that of pooled maps does not."""
    maps = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert not norm_of_images(nn.ModuleDict(dict(head=maps, backbone=nn.BatchNorm1d(4))))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)))
    assert norm_of_images(nn.ModuleDict(dict(head=pooled))) == 'head.1.1'
    assert not norm_of_images(nn.ModuleDict(dict(head=pooled)), processes=2)


@pytest.mark.parametrize('option', ['visualizer', 'vis_backends'])
@pytest.mark.parametrize('kind', PACKAGES)
def test_a_logger_that_is_not_installed(option, kind, monkeypatch):
    monkeypatch.setattr('mmmilan.engine.config_check.find_spec', lambda name: None)
    backends = [dict(type='LocalVisBackend'), dict(type=f'mmengine.{kind}')]
    config = Config({option: dict(type='Visualizer', vis_backends=backends) if option == 'visualizer' else backends})
    with pytest.raises(InputError, match=rf'\.1 \({kind}\) needs {PACKAGES[kind]}, which is not installed; run `pip'):
        check_packages(config)
    monkeypatch.setattr('mmmilan.engine.config_check.find_spec', lambda name: True)
    check_packages(config)


TRAINING = dict(model={}, train_dataloader={}, train_cfg=dict(max_epochs=4), optim_wrapper={})
VALIDATION = dict(val_dataloader={}, val_cfg={}, val_evaluator=[])
SAVES_BEST = dict(default_hooks=dict(checkpoint=dict(save_best='auto')))
NORMALISED = dict(dataset=dict(pipeline=[dict(type='mmcv.Normalize')]))
UNSHUFFLED = dict(train_dataloader=dict(sampler=None))


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (TRAINING, ''),
        (TRAINING | VALIDATION | SAVES_BEST, ''),
        (TRAINING | SAVES_BEST, 'save_best of the checkpoint hook needs a validation, but the config has no v'),
        (TRAINING | dict(custom_hooks=[dict(type='EarlyStoppingHook')]), 'EarlyStoppingHook needs a validation, but'),
        (
            TRAINING | VALIDATION | SAVES_BEST | dict(train_cfg=dict(max_epochs=4, val_begin=5)),
            'needs a validation, but train_cfg.val_begin=5 is after the end; correct that, or leave it out.',
        ),
        (
            TRAINING | VALIDATION | dict(val_evaluator=None),
            'no val_evaluator, which the val loop needs; set it, or all',
        ),
        (
            TRAINING | dict(val_evaluator=[]),
            'The config has no val_dataloader and no val_cfg, which the val loop',
        ),
        (TRAINING | dict(train_cfg=None), 'The config has no train_cfg, which the train loop needs; set it.'),
        (VALIDATION, 'no train_dataloader and no train_cfg and no optim_wrapper, which the train loop needs'),
        (TRAINING | dict(model=dict(data_preprocessor=None)), 'model.data_preprocessor is None: the model would get'),
        (TRAINING | dict(model=dict(backbone={})), 'model.data_preprocessor is not set: the model would get'),
        (TRAINING | dict(model=dict(backbone={}, data_preprocessor={})), 'model.data_preprocessor has no mean: the mo'),
        (TRAINING | dict(model=dict(data_preprocessor=dict(type='mmpretrain.SelfSupDataPreprocessor'))), 'has no mean'),
        (TRAINING | dict(model=dict(data_preprocessor=dict(type='mmdet.DetDataPreprocessor'))), ''),  # as YOLOX has it
        (TRAINING | dict(model=dict(data_preprocessor=dict(mean=[123.7] * 3, std=[58.4] * 3))), ''),
        (TRAINING | dict(model=dict(backbone={}), train_dataloader=NORMALISED), ''),
        (TRAINING | dict(default_hooks=dict(checkpoint=None)), 'checkpoint is None: nothing of the run would be'),
        (TRAINING | UNSHUFFLED, 'train_dataloader.sampler is None: images would not be shuffled'),
    ],
)
def test_what_a_run_is_told_takes_place(config, message):
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_loops(Config(config), 'train')


def joined(tmp_path: Path, second: tuple[str, ...], kind: str) -> Dataset:
    """A training set that joins classes (ant, bee) and others, three images of each."""
    parts = []
    for name, classes in (('one', ('ant', 'bee')), ('two', second)):
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(3):
                cv2.imwrite(str(tmp_path / name / label / f'{label}{i}.png'), np.zeros((8, 8, 3), np.uint8))
        part = dict(type='mmmilan.ImageFolder', data_root=str(tmp_path / name), with_label=True)
        if kind == 'coco':
            files = sorted((tmp_path / name).rglob('*.png'))
            boxes = [
                dict(bbox=[0, 0, 4, 4], area=9, iscrowd=0, category_id=classes.index(f.parent.name)) for f in files
            ]
            content = dict(
                images=[dict(id=i, file_name=str(f), height=8, width=8) for i, f in enumerate(files)],
                annotations=[dict(box, id=i, image_id=i) for i, box in enumerate(boxes)],
                categories=[dict(id=i, name=label) for i, label in enumerate(classes)],
            )
            (tmp_path / f'{name}.json').write_text(json.dumps(content))
            part = dict(type='mmmilan.CocoDataset', ann_file=str(tmp_path / f'{name}.json'), data_prefix=dict(img=''))
        parts.append(part | dict(pipeline=[]))
    dataset = dict(type='ConcatDataset', datasets=parts)
    loader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
    runner = SimpleNamespace(build_dataloader=Runner.build_dataloader)
    check_data_sets(runner)
    return runner.build_dataloader(loader).dataset


@pytest.mark.parametrize('kind', ['folders', 'coco'])
@pytest.mark.parametrize('second', [('bee', 'ant'), ('bee',)])
def test_joined_data_sets_are_numbered_by_name(tmp_path, second, kind):
    dataset = joined(tmp_path, second, kind)
    assert len(dataset) == 6 + 3 * len(second) and tuple(dataset.metainfo['classes']) == ('ant', 'bee')
    for i in range(len(dataset)):
        entry = dataset[i]
        label = entry['instances'][0]['bbox_label'] if kind == 'coco' else entry['gt_label']
        assert ('ant', 'bee')[label] == Path(entry['img_path']).parent.name


@pytest.mark.parametrize('kind', ['folders', 'coco'])
def test_joined_data_sets_of_other_classes(tmp_path, kind):
    """Their union would be no number of classes that the config has."""
    with pytest.raises(InputError, match=r'two.* has 1 of its 2 classes, cat .*, where .*one.* has ant, bee.*; rename'):
        joined(tmp_path, ('bee', 'cat'), kind)
