"""Evaluation of pretraining models, and of classifiers on other data sets than they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from mmengine.evaluator import BaseMetric
from mmpretrain.evaluation import Accuracy

from mmmilan.errors import InputError
from mmmilan.registry import METRICS


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
                f'The model has {num_classes} classes; ImageNetSubsetAccuracy needs the 1000 of ImageNet-1k '
                '(model.head.num_classes).'
            )
        scores = [sample['pred_score'][self.columns] for sample in data_samples]
        labels = [sample['gt_label'] for sample in data_samples]
        super().process(
            data_batch, [dict(pred_score=s, gt_label=label) for s, label in zip(scores, labels, strict=True)]
        )


@METRICS.register_module(name='IoUMetric')
def iou_metric(**kwargs) -> BaseMetric:
    """MMSegmentation's ``IoUMetric``, which says how many classes its means are over; same arguments.

    Without a single labelled pixel it raises an :class:`InputError`. It imports mmseg only when it is called.
    """
    from mmmilan.evaluation.mmseg_iou import IoUMetric

    return IoUMetric(**kwargs)
