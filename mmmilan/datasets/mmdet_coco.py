"""mmdet's COCO data set with checked annotations. This file imports mmdet."""

from __future__ import annotations

from pathlib import Path

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO

from mmmilan.datasets.annotations import check_coco
from mmmilan.errors import InputError
from mmmilan.files import first_line


class CheckedCOCO(COCO):
    """mmdet's index of an annotation file, which checks the annotations before it indexes them."""

    def __init__(self, annotation_file: str) -> None:
        self.path = Path(annotation_file)
        try:
            super().__init__(annotation_file)
        except InputError:
            raise
        except (OSError, ValueError, AssertionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
            raise InputError(
                f"{annotation_file} cannot be read as JSON in COCO's format ({first_line(error)}); write it again."
            ) from error

    def createIndex(self) -> None:  # noqa: N802
        check_coco(self.dataset, self.path)
        super().createIndex()


class CocoDataset(MMDetCocoDataset):
    """See :func:`mmmilan.datasets.coco.coco_dataset`."""

    COCOAPI = CheckedCOCO

    def load_data_list(self) -> list[dict]:
        data = super().load_data_list()
        missing = len(self.metainfo['classes']) - len(self.cat_ids)
        if missing:  # mmdet would renumber the others without a gap
            raise InputError(
                f"{self.ann_file} lacks {missing} of the {len(self.metainfo['classes'])} classes; give the data set's "
                'metainfo.classes the names of that file.'
            )
        return data
