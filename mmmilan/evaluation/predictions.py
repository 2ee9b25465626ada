"""What a model predicts for an image, and how good it is: in all, by class, by image, with intervals over the images.

Predictions and annotations are arrays by name, in one form for all three tasks:

* classification: ``labels`` int64 [C], best first, and ``scores`` float32 [C], their probabilities; annotated:
  ``labels`` [1].
* detection: ``boxes`` float32 [K, 4] (left, top, right, bottom in pixels), ``labels`` int64 [K], ``scores`` [K] if
  predicted, ``masks`` bool [K, H, W] of a model with masks, and ``size`` [2], height and width of the image.
* segmentation: ``map`` [H, W], uint8 (int32 for more than 256 classes); 255 marks pixels that are not annotated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import nn

from mmmilan.datasets.classes import IGNORE
from mmmilan.errors import InputError

Result = dict[str, np.ndarray]
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
SIZES = ('small', 'medium', 'large')  # below 32 x 32 and 96 x 96 pixels, and above, as COCO has them
RESAMPLES = 2000
FEW = 100  # resamples of an AP, each of which takes a tenth of a second


def predicted_task(model: nn.Module) -> str:
    """The task of a model of mmpretrain, mmdet or mmseg.

    Raises:
        InputError: it has no head for one.
    """
    if hasattr(model, 'decode_head'):
        return 'segmentation'
    if hasattr(model, 'roi_head') or hasattr(model, 'bbox_head'):
        return 'detection'
    if getattr(model, 'with_head', False):
        return 'classification'
    raise InputError(
        'This model has no head that predicts classes; give one that was trained on labels, or take features of it '
        '(mmmilan embed).'
    )


def num_classes(model: nn.Module, task: str) -> int | None:
    """How many classes a model predicts; None if it does not say."""
    heads = dict(classification='head', detection='bbox_head', segmentation='decode_head')
    head = getattr(getattr(model, 'roi_head', model), heads[task], None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return getattr(head, 'num_classes', None)


def predicted(sample: BaseDataElement, task: str) -> Result:
    """The prediction in a data sample of mmpretrain, mmdet or mmseg."""
    if task == 'classification':
        scores = sample.pred_score.float().cpu().numpy()
        labels = np.argsort(-scores, kind='stable')
        return dict(labels=labels, scores=scores[labels])
    if task == 'segmentation':
        return dict(map=as_map(sample.pred_sem_seg.data[0]))
    return instances(sample.pred_instances, sample)


def annotated(sample: BaseDataElement, task: str) -> Result:
    """The annotation in a data sample of mmpretrain, mmdet or mmseg."""
    if task == 'classification':
        return dict(labels=sample.gt_label.cpu().numpy())
    if task == 'segmentation':
        return dict(map=as_map(sample.gt_sem_seg.data[0]))
    return instances(sample.gt_instances, sample)


def as_map(labels: torch.Tensor) -> np.ndarray:
    """Labels [H, W] as small integers."""
    rows = labels.cpu().numpy()
    return rows.astype(np.uint8 if not rows.size or rows.max() < 256 else np.int32)


def instances(found: Any, sample: BaseDataElement) -> Result:
    """The objects of a data sample of mmdet."""
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    result = dict(
        boxes=boxes.float().cpu().numpy(), labels=found.labels.cpu().numpy(), size=np.array(sample.ori_shape[:2])
    )
    if 'scores' in found:
        result['scores'] = found.scores.float().cpu().numpy()
    if 'masks' in found:
        masks = found.masks
        masks = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else masks.cpu().numpy()
        result['masks'] = masks.astype(bool)
    return result


def all_names(model: nn.Module, task: str) -> tuple[str, ...]:
    """The names of the classes of a model of ``mmmilan.get_model``, in the order of its labels; numbers if it has none.

    Raises:
        InputError: there are more or fewer names than classes.
    """
    number = num_classes(model, task)
    classes = tuple(map(str, model._dataset_meta.get('classes') or range(number or 0)))
    if number is not None and len(classes) != number:
        raise InputError(
            f'The checkpoint names {len(classes)} classes, but its head has {number}; give a checkpoint whose metainfo '
            'and head agree.'
        )
    return classes


def coco_results(result: Result) -> list[dict]:
    """Objects in COCO's result format, without the image's id; categories are numbered from 1."""
    found = []
    for i, (left, top, right, bottom) in enumerate(result['boxes'].round(2).tolist()):
        box = [left, top, round(right - left, 2), round(bottom - top, 2)]
        each = dict(category_id=int(result['labels'][i]) + 1, bbox=box, score=round(float(result['scores'][i]), 5))
        if 'masks' in result:
            from pycocotools import mask

            rle = mask.encode(np.asfortranarray(result['masks'][i], np.uint8))
            each |= dict(segmentation=dict(size=rle['size'], counts=rle['counts'].decode()), area=int(mask.area(rle)))
        else:
            each['area'] = round(box[2] * box[3], 2)
        found.append(each)
    return found


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Interval of 95 % of 100 times the mean, from the means of resampled values; the draws are always the same."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(100 * values[draws].mean(1), (2.5, 97.5))
    return float(low), float(high)


def object_score(found: Result, truth: Result) -> float | None:
    """AP of the boxes in an image, from 0 to 1 (IoU 0.5 to 0.95), the mean over its classes; None without an object.

    The boxes of both are in pixels of the file's image: test pipelines load annotations after they resize.
    """
    aps = []
    for label in np.unique(truth['labels']):
        own = found['labels'] == label
        order = np.argsort(-found['scores'][own], kind='stable')
        overlaps = box_ious(found['boxes'][own][order], truth['boxes'][truth['labels'] == label])
        aps += [average_precision(overlaps, threshold) for threshold in IOUS]
    return float(np.mean(aps)) if aps else None


def box_ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU [N, M] of boxes [N, 4] and others [M, 4], each x1, y1, x2, y2."""
    sides = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(boxes[:, None, :2], others[:, :2])
    common = sides.clip(0).prod(-1)
    areas = [(each[:, 2:] - each[:, :2]).prod(-1) for each in (boxes, others)]
    return common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-9)


def average_precision(overlaps: np.ndarray, threshold: float) -> float:
    """AP of one class in one image: the area below the precision by recall, which falls monotonically.

    Args:
        overlaps: IoU [N, M] of detections, the most certain first, and M > 0 objects.
        threshold: A detection is right if it overlaps at least so much with an object that none before it has taken.
    """
    free, right = np.ones(overlaps.shape[1], bool), np.zeros(len(overlaps))
    for place, row in enumerate(overlaps):
        best = np.argmax(np.where(free, row, -1))
        if free[best] and row[best] >= threshold:
            free[best], right[place] = False, 1
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * right).sum() / overlaps.shape[1])


class LabelCounts:
    """Counts of the pixels of label maps, image by image, for IoU.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes, self.common, self.either, self.annotated = num_classes, [], [], []

    def add(self, result: Result, truth: Result) -> float | None:
        """Count an image; returns its mean IoU over the classes in either map, None without any."""
        known = truth['map'] != IGNORE
        predicted, annotated = (each['map'][known].astype(int) for each in (result, truth))
        counts = [np.bincount(each, minlength=self.num_classes) for each in (predicted, annotated)]
        common = np.bincount(annotated[predicted == annotated], minlength=self.num_classes)
        either = counts[0] + counts[1] - common
        for store, row in ((self.common, common), (self.either, either), (self.annotated, counts[1])):
            store.append(row[: self.num_classes])
        there = either > 0
        return float((common[there] / either[there]).mean()) if there.any() else None

    def iou(self, weights: np.ndarray | None = None) -> np.ndarray:
        """IoU [..., C] in percent, NaN for classes that are nowhere, of images [..., M] taken so many times."""
        weights = np.ones(len(self.common)) if weights is None else weights
        common, either = (weights @ np.array(each, float) for each in (self.common, self.either))
        return 100 * np.divide(common, either, out=np.full(common.shape, np.nan), where=either > 0)

    def interval(self) -> tuple[float, float]:
        """Interval of 95 % of the mean IoU, by resampling images."""
        means = np.nanmean(self.iou(resampled(len(self.common), RESAMPLES)), -1)
        return tuple(np.percentile(means, (2.5, 97.5)).tolist())


def resampled(number: int, times: int) -> np.ndarray:
    """How often each of some images is drawn [times, number]; the draws are always the same."""
    return np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), times)


class AveragePrecision:
    """COCO's AP from pycocotools' matches of predicted and annotated objects.

    Args:
        annotations: pycocotools' ``COCO`` of the annotated images.
        results: The predicted objects of all images, in COCO's result format.
        images: Ids of the images [M].
        categories: Ids of the categories [C] in the order of the labels.
        kind: 'bbox' or 'segm'.
    """

    def __init__(
        self, annotations: object, results: list[dict], images: Sequence[int], categories: Sequence[int], kind: str
    ) -> None:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if kind == 'segm':  # the area of a mask is not that of its box
            results = [{key: value for key, value in each.items() if key != 'bbox'} for each in results]
        found = annotations.loadRes(results) if results else COCO()
        evaluation = COCOeval(annotations, found, kind)
        evaluation.params.imgIds, evaluation.params.catIds = list(images), list(categories)
        evaluation.params.useCats, evaluation.params.maxDets = 1, [100, 300, 1000]  # as mmdet's metric has them
        evaluation.evaluate()
        self.number, self.classes = len(images), len(categories)
        rows = [list(evaluation.params.catIds).index(category) for category in categories]  # they were sorted
        columns = np.searchsorted(evaluation.params.imgIds, images)
        matches = np.empty((self.classes, 4, self.number), object)
        matches.ravel()[:] = evaluation.evalImgs
        self.matches = matches[rows][:, :, columns]

    def value(self, label: int, size: int = 0, images: Iterable[int] | None = None, iou: int | None = None) -> float:
        """AP of a class in percent; NaN without objects.

        Args:
            label: Of the class.
            size: 0 for all objects, else 1 + its place in :data:`SIZES`.
            images: Places of the images that count, each as often as it stands there; by default all.
            iou: Place of one IoU in :data:`IOUS`; by default the mean over all.
        """
        row = self.matches[label, size]
        each = [row[i] for i in (range(self.number) if images is None else images) if row[i] is not None]
        objects = sum(int((match['gtIgnore'] == 0).sum()) for match in each)
        if not objects:
            return float('nan')
        scores = np.concatenate([match['dtScores'] for match in each])
        order = np.argsort(-scores, kind='mergesort')
        matched = np.concatenate([match['dtMatches'] for match in each], axis=1)[:, order] > 0
        counts = ~np.concatenate([match['dtIgnore'] for match in each], axis=1)[:, order].astype(bool)
        right, wrong = (matched & counts).cumsum(1), (~matched & counts).cumsum(1)
        aps = []
        for ours, theirs in zip(right, wrong, strict=True):
            precision = ours / np.maximum(ours + theirs, np.spacing(1))
            precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
            aps.append(precision[np.searchsorted(ours / objects, RECALLS, side='left')].mean())
        return 100 * float(np.mean(aps) if iou is None else aps[iou])

    def mean(self, size: int = 0, images: Iterable[int] | None = None, iou: int | None = None) -> float:
        """The mean over the classes that have objects, in percent; NaN if none has."""
        values = [self.value(label, size, images, iou) for label in range(self.classes)]
        values = [value for value in values if value == value]
        return float(np.mean(values)) if values else float('nan')

    def interval(self) -> tuple[float, float]:
        """Interval of 95 % of the mean, by resampling images."""
        draws = (np.repeat(np.arange(self.number), times) for times in resampled(self.number, FEW))
        return tuple(np.nanpercentile([self.mean(images=draw) for draw in draws], (2.5, 97.5)).tolist())


def wrong_objects(result: Result, truth: Result, threshold: float) -> int:
    """How many objects are missed, or predicted with a score from ``threshold`` where none of that class is."""
    drawn = np.flatnonzero(result['scores'] >= threshold)
    free, wrong = np.ones(len(truth['labels']), bool), 0
    for i in drawn[np.argsort(-result['scores'][drawn], kind='stable')]:
        overlaps = box_ious(result['boxes'][[i]], truth['boxes'])[0] * (free & (truth['labels'] == result['labels'][i]))
        best = overlaps.argmax() if len(overlaps) else 0
        if len(overlaps) and overlaps[best] >= IOUS[0]:
            free[best] = False
        else:
            wrong += 1
    return wrong + int(free.sum())
