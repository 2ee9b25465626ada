"""``mmmilan test --show-dir`` and ``--tta``, for each task."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from helpers import demo_config, read_metrics, save_trained
from mmmilan.engine.launch import test as run_test
from mmmilan.errors import InputError

TASKS = ('classification', 'detection', 'segmentation')


@pytest.fixture
def trained(scenes, tmp_path):
    """Writes an untrained checkpoint of a task whose config tests the ten scenes."""

    def write(task: str, boxes_alone: bool = False) -> Path:
        cfg = demo_config(task)
        if boxes_alone:
            cfg.model.roi_head.mask_head = cfg.model.roi_head.mask_roi_extractor = None
            cfg.test_dataloader.dataset.pipeline[2].with_mask = False
            cfg.test_evaluator.metric = 'bbox'
        cfg.test_dataloader.update(num_workers=0, persistent_workers=False, batch_size=5)
        cfg.test_dataloader.dataset.update(data_root=str(scenes))
        if task == 'detection':
            cfg.test_evaluator.ann_file = str(scenes / 'annotations/instances_val.json')
        classes = cfg.test_dataloader.dataset.get('metainfo', {}).get('classes') or sorted(
            path.name for path in (scenes / 'val').iterdir() if path.is_dir()
        )
        cfg.work_dir = str(tmp_path / 'work')
        return save_trained(cfg, tmp_path / f'{task}.pth', classes)

    return write


@pytest.mark.parametrize('task', TASKS)
def test_truth_beside_prediction(task, trained, scenes, tmp_path):
    weights, folder = trained(task), tmp_path / 'pictures'
    run_test(weights, show_dir=folder)
    drawn = sorted(path.relative_to(folder) for path in folder.rglob('*.jpg'))
    assert drawn == sorted(path.relative_to(scenes) for path in (scenes / 'val').rglob('*.jpg'))
    image = cv2.imread(str(folder / drawn[0]))
    assert image.shape[1] >= 2 * 48 and (image[:, : image.shape[1] // 2] != image[:, image.shape[1] // 2 :]).any()
    with pytest.raises(InputError, match='pictures exists; choose another folder, or add --overwrite'):
        run_test(weights, show_dir=folder)
    with pytest.raises(InputError, match='the pictures would be among them'):
        run_test(weights, show_dir=scenes / 'val/new')


@pytest.mark.parametrize('task', TASKS)
def test_several_views(task, trained, tmp_path):
    if task == 'detection':
        with pytest.raises(InputError, match='averages boxes and no masks; leave out --tta'):
            run_test(trained(task), tta=True)
    weights = trained(task, boxes_alone=task == 'detection')
    run_test(weights, tta=True, show_dir=tmp_path / 'pictures')
    names = dict(classification='accuracy/top1', detection='coco/bbox_mAP', segmentation='mIoU')
    assert 0 <= read_metrics(tmp_path / 'work')[names[task]] <= 100
    assert len(list((tmp_path / 'pictures').rglob('*.jpg'))) == 10
