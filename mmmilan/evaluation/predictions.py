"""What a model predicts for an image, and what is annotated, as arrays by name: one form for all three tasks.

* classification: ``labels`` int64 [C], best first, and ``scores`` float32 [C], their probabilities; annotated:
  ``labels`` [1].
* detection: ``boxes`` float32 [K, 4] (left, top, right, bottom in pixels), ``labels`` int64 [K], ``scores`` [K] if
  predicted, ``masks`` bool [K, H, W] of a model with masks, and ``size`` [2], height and width of the image.
* segmentation: ``map`` [H, W], uint8 (int32 for more than 256 classes); 255 marks pixels that are not annotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import nn

from mmmilan.errors import InputError

Result = dict[str, np.ndarray]


def task_of(model: nn.Module) -> str:
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


def all_names(classes: Sequence[str], count: int | None) -> tuple[str, ...]:
    """The names of the classes of a model; their numbers if it has none.

    Raises:
        InputError: there are more or fewer names than classes.
    """
    classes = tuple(map(str, classes)) or tuple(map(str, range(count or 0)))
    if count is not None and len(classes) != count:
        raise InputError(
            f'The checkpoint names {len(classes)} classes, but its head has {count}; give a checkpoint whose metainfo '
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
