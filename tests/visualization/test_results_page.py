"""The page of a trained model: its figures are those of OpenMMLab's metrics, its pictures those of the images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from helpers import demo_config, read_metrics, save_trained
from mmmilan.engine.launch import test as run_test
from mmmilan.errors import InputError
from mmmilan.evaluation.results import AveragePrecision, LabelCounts, wrong_objects
from mmmilan.visualization.results_page import write_results

TASKS = ('classification', 'detection', 'segmentation')


@pytest.fixture
def trained(scenes, tmp_path):
    """Writes an untrained checkpoint of a task whose config reads the ten scenes."""

    def write(task: str) -> Path:
        cfg = demo_config(task)
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.update(num_workers=0, persistent_workers=False, batch_size=5)
            loader.dataset.update(data_root=str(scenes), indices=None)
        if task == 'detection':
            for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
                evaluator.ann_file = str(scenes / 'annotations/instances_val.json')
        classes = cfg.test_dataloader.dataset.get('metainfo', {}).get('classes') or sorted(
            path.name for path in (scenes / 'val').iterdir() if path.is_dir()
        )
        cfg.work_dir = str(tmp_path / 'work')
        return save_trained(cfg, tmp_path / f'{task}.pth', classes)

    return write


@pytest.mark.parametrize('task', TASKS)
def test_page(task, trained, tmp_path, monkeypatch):
    monkeypatch.setattr('mmmilan.evaluation.results.FEW', 5)
    weights = trained(task)
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    rows = [dict(step=step, epoch=step // 4 + 1, loss=3.0 / step) for step in range(1, 9)]
    log.write_text('\n'.join(map(json.dumps, rows)))
    comparison = dict(sentence='Pretraining helped: <so much> & more.')
    page = write_results(weights, tmp_path / 'report.html', comparison)
    text = page.read_text()
    assert 'Pretraining helped: &lt;so much&gt; &amp; more.' in text and 'training loss' in text
    assert '10 validation images' in text and 'trained on 10 images' in text and 'The worst mistakes' in text
    run_test(weights, work_dir=tmp_path / 'tested')
    figures = read_metrics(tmp_path / 'tested')
    verdict = re.search(r'class="verdict">(.*?)<', text)[1]
    expected = dict(classification='accuracy/top1', segmentation='mIoU', detection='coco/bbox_mAP')[task]
    factor = 100 if task == 'detection' else 1
    shown = [float(value) for value in re.findall(r'([\d.]+) % \(95 % interval', verdict)]
    assert shown[0] == pytest.approx(factor * figures[expected], abs=0.06)
    if task == 'detection':
        assert shown[1] == pytest.approx(100 * figures['coco/segm_mAP'], abs=0.06)
    assert text.count('<img') >= 2 * 10
    for name in ('gingham', 'tiger'):
        assert f'<td>{name}</td>' in text


def test_what_cannot_be_written(trained, tmp_path):
    weights = trained('classification')
    with pytest.raises(InputError, match='does not end in .html'):
        write_results(weights, tmp_path / 'page.txt')
    cfg = demo_config('classification')
    cfg.val_dataloader.dataset.data_root = 'gone'
    with pytest.raises(InputError, match='gone does not exist'):
        write_results(save_trained(cfg, tmp_path / 'a.pth', 'abcdefghij'), tmp_path / 'page.html')
    assert not list(tmp_path.glob('page.*'))


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_ap_is_cocos(kind):
    """All of COCOeval's figures, on random objects of all sizes, with crowds, for categories in any order."""
    coco, cocoeval = pytest.importorskip('pycocotools.coco'), pytest.importorskip('pycocotools.cocoeval')
    rng, categories = np.random.default_rng(0), [7, 3, 9]
    images, objects, found = [5, 2, 11, 4], [], []
    for image in images:
        for _ in range(12):
            x, y = rng.uniform(0, 200, 2)
            w, h = rng.uniform(5, 150, 2)
            category = int(rng.choice(categories[:2]))
            objects.append(
                dict(id=len(objects) + 1, image_id=image, category_id=category, bbox=[x, y, w, h], area=w * h,
                     iscrowd=int(rng.random() < 0.1), segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
            )  # fmt: skip
            for _ in range(2):
                dx, dy = rng.normal(0, 6, 2)
                polygon = [x + dx, y + dy, x + dx + w, y + dy, x + dx + w, y + dy + h, x + dx, y + dy + h]
                found.append(dict(image_id=image, category_id=category, score=float(rng.random()),
                                  bbox=[x + dx, y + dy, w, h], segmentation=[polygon], area=w * h))  # fmt: skip
    truth = coco.COCO()
    truth.dataset = dict(
        images=[dict(id=image, height=400, width=400) for image in images],
        annotations=objects,
        categories=[dict(id=category, name=str(category)) for category in categories],
    )
    truth.createIndex()
    for each in objects:
        if each['iscrowd']:
            each['segmentation'] = truth.annToRLE(each | dict(iscrowd=0))
    for each in found:
        each['segmentation'] = truth.annToRLE(each)
    mine = AveragePrecision(truth, found, images, categories, kind)
    rows = [{k: v for k, v in each.items() if k != 'bbox' or kind == 'bbox'} for each in found]
    theirs = cocoeval.COCOeval(truth, truth.loadRes(rows), kind)
    theirs.params.maxDets = [1, 10, 1000]
    theirs.evaluate()
    theirs.accumulate()
    precision = theirs.eval['precision'][..., -1]  # IoU, recall, category, size
    for label, category in enumerate(categories):
        for size in range(4):
            own = precision[:, :, sorted(categories).index(category), size]
            expected = 100 * own.mean() if (own > -1).all() else np.nan
            assert mine.value(label, size) == pytest.approx(expected, nan_ok=True)
    assert np.isnan(mine.value(2)) and mine.mean(iou=0) == pytest.approx(100 * precision[0, :, :2, 0].mean())
    low, high = mine.interval()
    assert low < mine.mean() < high


def test_nothing_is_found():
    coco = pytest.importorskip('pycocotools.coco')
    truth = coco.COCO()
    objects = [dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 9, 9], area=81, iscrowd=0)]
    truth.dataset = dict(images=[dict(id=1, height=9, width=9)], annotations=objects, categories=[dict(id=1, name='a')])
    truth.createIndex()
    assert AveragePrecision(truth, [], [1], [1], 'bbox').mean() == 0


def test_label_counts():
    counts = LabelCounts(3)
    truth = np.array([[0, 0, 1, 255]])
    assert counts.add(dict(map=np.array([[0, 1, 1, 2]])), dict(map=truth)) == pytest.approx(0.5)
    assert counts.add(dict(map=np.array([[0, 0, 0, 0]])), dict(map=np.zeros((1, 4), int))) == 1
    assert np.allclose(counts.iou(), [100 * 5 / 6, 50, np.nan], equal_nan=True)
    low, high = counts.interval()
    assert low == pytest.approx(50) and high == 100


def test_wrong_objects():
    box = np.array([[0, 0, 10, 10]], np.float32)
    truth = dict(boxes=np.concatenate([box, box + 50]), labels=np.array([0, 1]))
    result = dict(
        boxes=np.concatenate([box + 1, box, box + 50]), labels=np.array([0, 0, 0]), scores=np.array([0.9, 0.8, 0.7])
    )
    assert wrong_objects(result, truth, 0.3) == 3  # found twice, of another class, and so missed
    assert wrong_objects(result, truth, 0.85) == 1
