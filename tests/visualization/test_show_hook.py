"""``mmmilan test --show-dir`` and ``--tta``, for each task."""

from __future__ import annotations

import cv2
import pytest

from helpers import read_metrics, rest_slow, save_untrained
from mmmilan.engine.launch import test as run_test
from mmmilan.errors import InputError

pytestmark = pytest.mark.usefixtures('own_second')
TASKS = ('classification', 'detection', 'segmentation')


@pytest.mark.parametrize('task', rest_slow(TASKS, 'classification'))
def test_truth_beside_prediction(task, scenes, tmp_path):
    weights, folder = save_untrained(task, scenes, tmp_path), tmp_path / 'pictures'
    run_test(weights, show_dir=folder)
    drawn = sorted(path.relative_to(folder) for path in folder.rglob('*.jpg'))
    assert drawn == sorted(path.relative_to(scenes) for path in (scenes / 'val').rglob('*.jpg'))
    image = cv2.imread(str(folder / drawn[0]))
    assert image.shape[1] >= 2 * 48 and (image[:, : image.shape[1] // 2] != image[:, image.shape[1] // 2 :]).any()
    with pytest.raises(InputError, match='pictures exists; choose another folder, or add --overwrite'):
        run_test(weights, show_dir=folder)
    with pytest.raises(InputError, match='the pictures would be among them'):
        run_test(weights, show_dir=scenes / 'val/new')


@pytest.mark.parametrize('task', rest_slow(TASKS, 'classification'))
def test_several_views(task, scenes, tmp_path):
    if task == 'detection':
        with pytest.raises(InputError, match='averages boxes and no masks; leave out --tta'):
            run_test(save_untrained(task, scenes, tmp_path), tta=True)
    weights = save_untrained(task, scenes, tmp_path, boxes_alone=task == 'detection')
    run_test(weights, tta=True, show_dir=tmp_path / 'pictures')
    names = dict(classification='accuracy/top1', detection='coco/bbox_mAP', segmentation='mIoU')
    assert 0 <= read_metrics(tmp_path / 'work')[names[task]] <= 100
    assert len(list((tmp_path / 'pictures').rglob('*.jpg'))) == 10
