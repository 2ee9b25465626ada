"""Scores of predictions: of an image, by class and in all; the figures of COCO's own evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from mmmilan.evaluation.predictions import (
    AveragePrecision,
    LabelCounts,
    annotated,
    object_score,
    predicted,
    wrong_objects,
)


def score(sample):
    return object_score(predicted(sample, 'detection'), annotated(sample, 'detection'))


def test_scores_of_an_image():
    """Boxes are in pixels of the file's image, whatever size the model saw."""
    boxes = torch.tensor([[2.0, 2.0, 10.0, 10.0], [20.0, 4.0, 30.0, 16.0]])
    sample = BaseDataElement(
        metainfo=dict(ori_shape=(32, 32), scale_factor=(2.0, 2.0)),
        gt_instances=InstanceData(bboxes=boxes, labels=torch.tensor([0, 1])),
        pred_instances=InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]), scores=torch.tensor([0.9, 0.8])),
    )
    assert score(sample) == 1
    sample.pred_instances = sample.pred_instances[:1]
    assert score(sample) == 0.5
    sample.gt_instances = sample.gt_instances[:0]
    assert score(sample) is None
    maps = dict(gt_sem_seg=torch.tensor([[[0, 0, 1, 255]]]), pred_sem_seg=torch.tensor([[[0, 1, 1, 0]]]))
    sample = BaseDataElement(**{name: PixelData(data=data) for name, data in maps.items()})
    assert LabelCounts(2).add(predicted(sample, 'segmentation'), annotated(sample, 'segmentation')) == 0.5
    nothing = dict(map=np.full((2, 2), 255, np.uint8))
    assert LabelCounts(2).add(nothing, nothing) is None


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
