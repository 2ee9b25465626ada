"""mmdet's COCO data set with checked annotations. This file imports mmdet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO

from mmmilan.datasets.annotations import category_ids, check_coco
from mmmilan.datasets.classes import as_name
from mmmilan.errors import InputError, listed, warn
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

    def get_cat_ids(self, cat_names: Sequence[str] = (), sup_names: Sequence = (), cat_ids: Sequence = ()) -> list:
        """The ids of categories in the order of ``cat_names``, where pycocotools has the order of the file."""
        return category_ids(self.cats, cat_names) if len(cat_names) else super().get_cat_ids([], sup_names, cat_ids)


class CocoDataset(MMDetCocoDataset):
    """See :func:`mmmilan.datasets.coco.coco_dataset`."""

    METAINFO: dict = {}

    def COCOAPI(self, path: str) -> CheckedCOCO:  # noqa: N802
        """Read an annotation file, and match its categories with the classes."""
        coco = CheckedCOCO(path)
        names = {number: as_name(category['name']) for number, category in coco.cats.items()}
        classes = tuple(map(as_name, self._metainfo.get('classes') or names.values()))
        self._metainfo['classes'] = classes
        objects = Counter(names[each['category_id']] for each in coco.anns.values())
        self.check_classes(classes, list(names.values()), objects)
        return coco

    def check_classes(self, classes: Sequence[str], names: list[str], objects: Counter[str]) -> None:
        """Compare the classes that were given with the names of the file's categories.

        Args:
            classes: The classes of ``metainfo``.
            names: The names in the file.
            objects: Number of objects by name.

        Raises:
            InputError: the file lacks a class, and this is a training split or it has other classes instead.
        """
        lacking, left_out = sorted(set(classes) - set(names)), sorted(name for name in objects if name not in classes)
        if lacking and (left_out or not self.test_mode):
            raise InputError(
                f'{self.ann_file} lacks {len(lacking)} of the {len(classes)} classes, {listed(lacking)}, and has '
                f'{listed(names)}; leave out metainfo.classes, or give it the names of that file.'
            )
        if left_out:
            count = sum(objects[name] for name in left_out)
            warn(
                f'{self.ann_file}: {count} of {objects.total()} objects are left out, of the {len(left_out)} '
                f'categories that metainfo.classes does not name: {listed(left_out)}.'
            )
        elif lacking:
            warn(f'{self.ann_file} lacks {len(lacking)} of the {len(classes)} classes: {listed(lacking)}.')

    def load_data_list(self) -> list[dict]:
        entries = super().load_data_list()
        if any(getattr(step, 'with_mask', False) for step in self.pipeline.transforms):
            check_masks(entries, self.ann_file)
        if not self.test_mode and not any(not each['ignore_flag'] for entry in entries for each in entry['instances']):
            warn(  # no error, as images without objects may be joined to others
                f'{self.ann_file} has no object to learn: none, or all are crowds, empty boxes or of other classes.'
            )
        return entries


def check_masks(entries: list[dict], path: str) -> None:
    """Check that each object has a mask, where the pipeline loads masks.

    Raises:
        InputError: some have none; the message counts them.
    """
    objects = [(entry['img_path'], each.get('mask')) for entry in entries for each in entry['instances']]
    bare = [image for image, mask in objects if not has_area(mask)]
    if bare:
        raise InputError(
            f'{path}: {len(bare)} of {len(objects)} objects have no segmentation, the first in {bare[0]}; add them, or '
            'remove all segmentations from the file to train a detector of boxes.'
        )


def has_area(mask: dict | list | None) -> bool:
    """Whether a segmentation is an RLE, or has a polygon of three points."""
    return isinstance(mask, dict) or any(len(polygon) >= 6 for polygon in mask or [])
