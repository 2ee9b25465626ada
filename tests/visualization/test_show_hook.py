"""``mmmilan test --show-dir`` and ``--tta``, for each task."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest

from helpers import read_metrics, rest_slow, save_untrained
from mmmilan import Predictor
from mmmilan.engine.launch import test as run_test
from mmmilan.errors import InputError
from mmmilan.files import write_part
from mmmilan.visualization.show_hook import ShowHook

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


@pytest.mark.parametrize('palette', [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3]], None])
def test_colours_are_those_of_predict(palette, tmp_path):
    """Those of the data set, where it has one for each class."""
    metainfo = dict(classes=('sky', 'sea'), palette=palette)
    dataset = SimpleNamespace(metainfo=metainfo, data_root=str(tmp_path / 'data'))
    model = SimpleNamespace(decode_head=None, _dataset_meta=metainfo)
    hook = ShowHook(str(tmp_path / 'pictures'))
    hook.before_test(SimpleNamespace(model=model, test_dataloader=SimpleNamespace(dataset=dataset)))
    predictor = SimpleNamespace(model=model, classes=metainfo['classes'])
    assert hook.colours == Predictor.colours.fget(predictor)
    assert (hook.colours == [(1, 2, 3), (4, 5, 6)]) == (palette is not None and len(palette) == 2)


def test_names_of_pictures(tmp_path):
    hook = ShowHook(str(tmp_path / 'pictures'))
    hook.root = str(tmp_path)
    assert [hook.name(str(tmp_path / name)) for name in ('a/b.jpg', 'c.png')] == ['a/b.jpg', 'c.png.jpg']
    long = [hook.name(str(tmp_path / f'{letter}/{"猫" * 82}{letter}.webp')) for letter in 'ab']
    for name in long:
        write_part(tmp_path / 'pictures' / name, b'')
    assert len({Path(name).name for name in long}) == 2


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
