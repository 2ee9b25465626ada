"""Scores of pretraining models, of classifiers on parts of ImageNet, of segmentors and of retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from mmengine.evaluator import BaseMetric
from mmpretrain.evaluation import Accuracy
from torch import Tensor

from mmmilan.errors import InputError, count, listed, warn
from mmmilan.registry import METRICS

APS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')  # of mmdet's metric
CHUNK = 1024  # rows of a matrix of similarities that are held at a time


@METRICS.register_module()
class ReconstructionLoss(BaseMetric):
    """Mean over images of the pretraining loss, as ``MILAN.predict`` gives it."""

    default_prefix = 'reconstruction'

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        self.results.extend(float(sample['loss']) for sample in data_samples)

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return dict(loss=sum(results) / len(results))


@METRICS.register_module()
class ImageNetSubsetAccuracy(Accuracy):
    """Accuracy of an ImageNet-1k classifier on a data set that has only some of the 1000 classes.

    Only the scores of the data set's own classes are compared, as the authors of ImageNet-A and ImageNet-R do for
    their 200 classes. The data set is an ``ImageFolder`` whose folders are named by WordNet ids.

    Args:
        topk: As for mmpretrain's ``Accuracy``; results are in percent.
        kwargs: Other arguments of ``Accuracy``.

    Raises:
        InputError: in use, if a folder is not the WordNet id of a class, or the model has not 1000 classes.
    """

    own_classes = True  # the data set is not numbered by the checkpoint's classes

    def __init__(self, topk: int | Sequence[int] = (1, 5), **kwargs) -> None:
        super().__init__(topk, thrs=None, **kwargs)

    @cached_property
    def columns(self) -> list[int]:
        """Where among the 1000 classes those of the data set are."""
        from timm.data import ImageNetInfo

        column = {wordnet_id: i for i, wordnet_id in enumerate(ImageNetInfo('imagenet-1k').label_names())}
        folders = self.dataset_meta['classes']
        unknown = [folder for folder in folders if folder not in column]
        if unknown:
            raise InputError(
                f'{len(unknown)} of the {len(folders)} class folders are not WordNet ids of ImageNet-1k '
                f'({", ".join(unknown[:3])}); set test_dataloader.dataset.data_root to the folder of n01440764, ...'
            )
        return [column[folder] for folder in folders]

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        num_classes = len(data_samples[0]['pred_score'])
        if num_classes != 1000:
            raise InputError(
                f'The model has {count(num_classes, "class")}; ImageNetSubsetAccuracy needs the 1000 of ImageNet-1k '
                '(model.head.num_classes).'
            )
        scores = [sample['pred_score'][self.columns] for sample in data_samples]
        labels = [sample['gt_label'] for sample in data_samples]
        super().process(
            data_batch, [dict(pred_score=s, gt_label=label) for s, label in zip(scores, labels, strict=True)]
        )


@METRICS.register_module(name='CocoMetric')
def coco_metric(**kwargs) -> BaseMetric:
    """MMDetection's ``CocoMetric``, whose AP is 0 if nothing was detected at all; same arguments.

    mmdet's has none then, of which neither the best checkpoint nor early stopping hears. It imports mmdet only when
    it is called.
    """
    from mmdet.evaluation import CocoMetric

    class CocoMetricOfAny(CocoMetric):
        def compute_metrics(self, results: list) -> dict[str, float]:
            kinds = [kind for kind in self.metrics if kind in ('bbox', 'segm')]
            if self.format_only or len(kinds) < len(self.metrics) or any(len(found['scores']) for _, found in results):
                return super().compute_metrics(results)
            warn(f'Nothing was detected in {count(len(results), "image")}: AP 0.')
            return {f'{kind}_{name}': 0.0 for kind in kinds for name in self.metric_items or APS}

    return CocoMetricOfAny(**kwargs)


@METRICS.register_module(name='IoUMetric')
def iou_metric(**kwargs) -> BaseMetric:
    """MMSegmentation's ``IoUMetric``, which says how many classes its means are over; same arguments.

    Without a single labelled pixel it raises an :class:`InputError`. It imports mmseg only when it is called.
    """
    from mmseg.evaluation import IoUMetric

    class CheckedIoUMetric(IoUMetric):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            if wrong := set(self.metrics) - {'mIoU', 'mDice', 'mFscore'}:  # mmseg's own fails after the first epoch
                raise InputError(f'iou_metrics has {listed(wrong)}; choose from mIoU, mDice and mFscore.')

        def compute_metrics(self, results: list) -> dict[str, float]:
            if not self.format_only:
                check_labels(self.dataset_meta['classes'], sum(labels for *_, labels in results).tolist())
            return super().compute_metrics(results)

    return CheckedIoUMetric(**kwargs)


def check_labels(classes: Sequence[str], pixels: Sequence[float]) -> None:
    """Say which classes have no labelled pixel, given their numbers.

    Raises:
        InputError: no class has one.
    """
    lacking = [name for name, number in zip(classes, pixels, strict=True) if not number]
    if len(lacking) == len(classes):
        raise InputError('No pixel of the label maps has a class, so there is nothing to score; check the maps.')
    if lacking:
        rest = [name for name in classes if name not in lacking]
        warn(
            f'The scores are of {len(rest)} of {len(classes)} classes ({listed(rest)}): no pixel of the label maps '
            f'has one of the others ({listed(lacking)}).'
        )


@METRICS.register_module()
class RetrievalRecall(BaseMetric):
    """Recall at k, in percent, of texts by images and of images by texts, over the whole test set.

    An image counts as right if one of its texts is among the k best. Each text is a query of its own. A tie counts as
    a failure. The model gives each data sample ``image_embedding`` [E] and ``text_embedding`` [T, E], of length 1.

    Args:
        topk: The values of k.
        collect_device: As for MMEngine's ``BaseMetric``.
    """

    default_prefix = 'retrieval'

    def __init__(self, topk: Sequence[int] = (1, 5, 10), collect_device: str = 'cpu') -> None:
        super().__init__(collect_device)
        self.topk = topk

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            if 'text_embedding' not in sample:
                raise InputError(
                    f'{sample.get("img_path", "A test image")} has no text; add TokenizeCaption with '
                    "all_captions=True and PackInputs with algorithm_keys=('text',) to the test pipeline."
                )
            self.results.append((sample['image_embedding'].float().cpu(), sample['text_embedding'].float().cpu()))

    def compute_metrics(self, results: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        images, texts = torch.stack([image for image, _ in results]), torch.cat([text for _, text in results])
        owner = torch.repeat_interleave(torch.tensor([len(text) for _, text in results]))
        ranks = dict(text=text_rank(images, texts, owner), image=image_rank(images, texts, owner))
        return {
            f'{name}_recall@{k}': 100 * float((rank < k).float().mean())
            for name, rank in ranks.items()
            for k in self.topk
        }


def text_rank(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """How many other texts are at least as close to an image as its own closest text.

    Args:
        images: Embeddings [I, E].
        texts: Embeddings [T, E].
        owner: The image [T] of each text, int64.

    Returns:
        Numbers [I]; what cannot be compared (NaN) counts as closer.
    """
    ranks = []
    for start in range(0, len(images), CHUNK):
        similarity = images[start : start + CHUNK] @ texts.T
        own = owner == torch.arange(start, start + len(similarity))[:, None]
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~own & ~(similarity < best)).sum(1))
    return torch.cat(ranks)


def image_rank(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """How many other images are at least as close to a text as its own: [T]. Arguments of :func:`text_rank`."""
    ranks = []
    for start in range(0, len(texts), CHUNK):
        similarity = texts[start : start + CHUNK] @ images.T
        own = similarity.gather(1, owner[start : start + CHUNK, None])
        ranks.append((~(similarity < own)).sum(1) - 1)
    return torch.cat(ranks)
