"""Register the COCO data set without importing mmdet, which the base installation lacks."""

from __future__ import annotations

from torch.utils.data import Dataset

from mmmilan.registry import DATASETS


@DATASETS.register_module(name='CocoDataset')
def coco_dataset(**kwargs) -> Dataset:
    """mmdet's ``CocoDataset`` with checked annotations; same arguments. It imports mmdet only when it is called.

    mmdet itself drops boxes of negative size or of unknown images and categories, trains on NaN, and numbers the
    classes of ``metainfo`` in the order of the file. Without ``metainfo.classes`` the classes are the file's.

    Raises:
        InputError: an entry of the file is wrong, see :mod:`mmmilan.datasets.annotations`; a training file lacks a
            class; or the pipeline loads masks and an object has none.
    """
    from mmmilan.datasets.mmdet_coco import CocoDataset

    return CocoDataset(**kwargs)
