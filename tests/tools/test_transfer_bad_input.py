"""Whatever a user gets wrong in a transfer is answered with one sentence."""

from __future__ import annotations

import json

import pytest
from mmengine.config import Config

from helpers import ROOT, rest_slow

TASKS = {
    'classification': ('vit-tiny-p8_finetune_scenes.py', 'model.head', 10),
    'detection': ('mask-rcnn_vit-tiny-p8_scenes.py', 'model.roi_head.mask_head', 10),
    'segmentation': ('upernet_vit-tiny-p8_scenes.py', 'model.auxiliary_head', 16),
}


@pytest.fixture
def error_of_training(scenes, run_tool, tmp_path):
    """Run tools/train.py, which fails, on a small config of a task with some changes; returns the error message."""

    def train(task: str, changes: dict | None = None) -> str:
        cfg = Config.fromfile(ROOT / 'configs/demo' / TASKS[task][0])
        cfg.model.backbone.init_cfg = None
        cfg.train_dataloader.batch_size = 2
        cfg.train_dataloader.dataset.indices = None
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.num_workers = 0
            loader.dataset.data_root = str(scenes)
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            if 'ann_file' in evaluator:
                evaluator.ann_file = str(scenes / 'annotations/instances_val.json')
        cfg.work_dir = str(tmp_path / 'work')
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
        cfg.merge_from_dict(changes or {})
        path = tmp_path / f'{tmp_path.name}.py'
        cfg.dump(path)
        with pytest.raises(SystemExit) as stop:
            run_tool('train.py', path)
        return str(stop.value.code)

    return train


@pytest.mark.parametrize('task', TASKS)
def test_wrong_class_count(task, error_of_training):
    _, head, count = TASKS[task]
    message = error_of_training(task, {f'{head}.num_classes': 7})
    assert message == f'error: The training data has {count} classes, but {head}.num_classes=7; make them equal.'


@pytest.mark.parametrize('task', rest_slow(['detection', 'segmentation'], 'detection'))
def test_missing_image(task, error_of_training, scenes):
    """Annotations that point at an image that is not there."""
    gone = next((scenes / 'train').rglob('*.jpg'))
    content = gone.read_bytes()
    gone.unlink()
    if task == 'segmentation':  # MMSegmentation lists the images, or takes a file that does
        listed = scenes / 'train.txt'
        listed.write_text(
            '\n'.join(
                str(path.relative_to(scenes / 'semantic/train').with_suffix(''))
                for path in (scenes / 'semantic/train').rglob('*.png')
            )
        )
    try:
        changes = {'train_dataloader.dataset.ann_file': 'train.txt'} if task == 'segmentation' else None
        message = error_of_training(task, changes)
    finally:
        gone.write_bytes(content)
    assert message.startswith(f'error: The image {gone} is missing; ')


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_empty_data_set(task, error_of_training, scenes, tmp_path):
    """Annotations of images without objects, which mmdet leaves out; a folder without images."""
    empty = tmp_path / ('instances.json' if task == 'detection' else 'images')
    if task == 'detection':
        content = json.loads((scenes / 'annotations/instances_train.json').read_text())
        empty.write_text(json.dumps(content | dict(annotations=[])))
        changes = dict(ann_file=str(empty), serialize_data=False)  # else MMEngine fails while it packs the list
    else:
        empty.mkdir()
        changes = dict(data_prefix=dict(img_path=str(empty)))
    message = error_of_training(task, {f'train_dataloader.dataset.{name}': value for name, value in changes.items()})
    assert message.startswith('error: The data set ') and str(empty) in message
    assert message.endswith(' is empty; correct its options or its files.')


@pytest.mark.parametrize(
    ('changes', 'fault'),
    [
        (
            dict(data_prefix='train'),
            "The number of subfolders (10) doesn't match the number of specified classes (1000)",
        ),
        (dict(split='trian'), "The split must be one of ['train', 'val', 'test'], but get 'trian'"),
    ],
    ids=['other number of classes', 'unknown split'],
)
def test_imagenet_that_does_not_fit(error_of_training, scenes, changes, fault):
    """mmpretrain's data set reports both by an assertion."""
    dataset = dict(_delete_=True, type='mmpretrain.ImageNet', data_root=str(scenes), pipeline=[]) | changes
    message = error_of_training('classification', {'train_dataloader.dataset': dataset})
    options = f'data_root={str(scenes)!r}, ' + ', '.join(f'{name}={value!r}' for name, value in changes.items())
    assert message == (
        f'error: The data set mmpretrain.ImageNet ({options}) cannot be loaded ({fault}); correct its options or its '
        'files.'
    )
