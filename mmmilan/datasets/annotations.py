"""Check COCO annotations and label maps, and name the faults that mmdet and mmseg would drop, misread or crash on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform

from mmmilan.datasets.decoding import open_header, read_bytes
from mmmilan.errors import InputError
from mmmilan.files import first_line
from mmmilan.registry import TRANSFORMS

PARTS = ('images', 'categories', 'annotations')
IGNORE = 255  # label of pixels without one


def check_coco(content: dict[str, Any], path: Path) -> None:
    """Check boxes and masks in COCO's format.

    Args:
        content: The parsed file.
        path: Its name, for the error.

    Raises:
        InputError: an entry is wrong; the message names the file and its first wrong entry.
    """
    lists = [content.get(name, []) for name in PARTS]
    if not all(isinstance(each, list) for each in lists):
        raise InputError(f"{path} is not in COCO's format: {', '.join(PARTS)} must be lists; convert it.")
    fault = next(find_faults(*lists), None)
    if fault:
        raise InputError(f'{path}, {fault}; correct or remove this entry.')


def find_faults(images: list, categories: list, annotations: list) -> Iterator[str]:
    """Yield what is wrong in COCO's three lists, each fault with the position of its entry in the file."""
    known: dict[str, set] = {}
    required = dict(images=(images, 'file_name'), categories=(categories, 'name'), annotations=(annotations, ''))
    for part, (entries, text) in required.items():
        known[part] = set()
        for index, entry in enumerate(entries):
            number = entry.get('id') if isinstance(entry, dict) else None
            if not isinstance(number, (int, str)):
                yield f'{part}[{index}] has no id'
            elif number in known[part]:
                yield f'{part}[{index}] has the id {number} of an earlier one'
            elif text and not isinstance(entry.get(text), str):
                yield f'{part}[{index}] has no {text}'
            known[part].add(number)
    for index, image in enumerate(images):
        for side in ('width', 'height'):
            if not is_size(image.get(side)):
                yield f'images[{index}] ({image["file_name"]}) has the {side} {image.get(side)!r}'
    sizes = {image['id']: [image['height'], image['width']] for image in images}
    for index, annotation in enumerate(annotations):
        fault = annotation_fault(annotation, sizes, known['categories'])
        if fault:
            yield f'annotations[{index}] (id {annotation["id"]}) has {fault}'


def annotation_fault(annotation: dict[str, Any], sizes: dict[int | str, list[int]], categories: set) -> str:
    """What is wrong with an annotation; '' if nothing is.

    Args:
        annotation: The annotation.
        sizes: Id of each image -> [height, width].
        categories: Ids of the categories.
    """
    for name, known in (('image_id', sizes), ('category_id', categories)):
        value = annotation.get(name)
        if not isinstance(value, (int, str)) or value not in known:
            return f'the unknown {name} {value!r}'
    box = annotation.get('bbox')
    if not is_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return f'the bbox {box!r}, which is not x, y, width and height'
    if not is_numbers([annotation.get('area')]):
        return f'the area {annotation.get("area")!r}'
    mask = annotation.get('segmentation') or []
    if isinstance(mask, dict) and mask.get('size') == sizes[annotation['image_id']] and mask.get('counts'):
        return ''
    if not isinstance(mask, list) or not all(is_numbers(each) and len(each) % 2 == 0 for each in mask):
        return "a segmentation that is neither polygons x, y, x, y, ... nor an RLE of the image's size"
    return ''


def is_size(value: Any) -> bool:
    """Whether it is a positive integer."""
    return type(value) is int and value > 0


def is_numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(type(value) in (int, float) and math.isfinite(value) for value in values)


@TRANSFORMS.register_module()
class LoadLabelMap(BaseTransform):
    """Read ``results['seg_map_path']`` into ``results['gt_seg_map']``, uint8 [H, W]: a strict ``LoadAnnotations``.

    mmseg's ``LoadAnnotations`` lets 16-bit labels wrap around, and with colour images, maps of another size or labels
    out of range the loss fails later or is silently wrong.

    Args:
        num_classes: Labels are 0 to ``num_classes - 1``; 255 marks unlabelled pixels. With the data set's
            ``reduce_zero_label``, the file has 1 to ``num_classes``; 0 marks unlabelled pixels.
        backend_args: MMEngine's file backend that holds the maps.

    Raises:
        InputError: the map is missing, does not decode, is not an 8-bit image of one channel, differs from its image in
            size, or has a label out of range.
    """

    def __init__(self, num_classes: int, backend_args: dict | None = None) -> None:
        self.num_classes = num_classes
        self.backend_args = backend_args

    def transform(self, results: dict) -> dict:
        path = results['seg_map_path']
        labels = read_label_map(read_bytes(path, self.backend_args), path)
        shape = tuple(results['ori_shape'][:2])
        if labels.shape != shape:
            sizes = ' x '.join(map(str, labels.shape[::-1])), ' x '.join(map(str, shape[::-1]))
            raise InputError(f'{path} is {sizes[0]}, but its image {sizes[1]} (width x height); make them equal.')
        if results['reduce_zero_label']:
            labels[labels == 0] = IGNORE
            labels[labels != IGNORE] -= 1
        self.check_labels(labels, path, int(results['reduce_zero_label']))
        table = np.arange(IGNORE + 1, dtype=np.uint8)
        for old, new in (results.get('label_map') or {}).items():
            table[old] = new
        results['gt_seg_map'] = table[labels]
        results['seg_fields'].append('gt_seg_map')
        return results

    def check_labels(self, labels: np.ndarray, path: str, first: int) -> None:
        """Raise an :class:`InputError` for labels out of range; ``first`` is the file's number of the first class."""
        wrong = labels[(labels >= self.num_classes) & (labels != IGNORE)]
        if wrong.size:
            raise InputError(
                f'{path} has the label {int(wrong.max()) + first} in {wrong.size} pixels, where {first} to '
                f'{self.num_classes - 1 + first} are possible; correct the map, or num_classes={self.num_classes} of '
                'the model and of LoadLabelMap.'
            )


def read_label_map(content: bytes, path: str) -> np.ndarray:
    """Decode an 8-bit image of one channel or with a palette -> uint8 [H, W].

    Raises:
        InputError: the file does not decode, or holds another kind of image.
    """
    try:
        with open_header(content) as image:
            mode, labels = image.mode, np.array(image)
    except Exception as error:  # of any type, as the file may hold anything
        raise InputError(f'{path} does not decode ({first_line(error)}); replace it.') from error
    if mode not in ('L', 'P', '1'):
        raise InputError(f'{path} is an image of mode {mode}; give label maps with one 8-bit channel.')
    return labels.astype(np.uint8)
