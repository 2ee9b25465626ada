"""How good a trained model is on labelled images: in all, by class, by image, with intervals over the images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mmmilan.datasets.classes import IGNORE
from mmmilan.evaluation.comparison import RESAMPLES, box_ious
from mmmilan.evaluation.predictions import Result

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
SIZES = ('small', 'medium', 'large')  # below 32 x 32 and 96 x 96 pixels, and above, as COCO has them
FEW = 100  # resamples of an AP, each of which takes a tenth of a second


class LabelCounts:
    """Counts of the pixels of label maps, image by image, for IoU.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes, self.common, self.either, self.annotated = num_classes, [], [], []

    def add(self, result: Result, truth: Result) -> float:
        """Count an image; returns its mean IoU over the classes in either map, 1 without any."""
        known = truth['map'] != IGNORE
        predicted, annotated = (each['map'][known].astype(int) for each in (result, truth))
        counts = [np.bincount(each, minlength=self.num_classes) for each in (predicted, annotated)]
        common = np.bincount(annotated[predicted == annotated], minlength=self.num_classes)
        either = counts[0] + counts[1] - common
        for store, row in ((self.common, common), (self.either, either), (self.annotated, counts[1])):
            store.append(row[: self.num_classes])
        there = either > 0
        return float((common[there] / either[there]).mean()) if there.any() else 1.0

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
