"""Annotations of objects as a detector is trained on them: two splits, classes by name, faults named and counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from mmmilan.datasets.classes import Names, as_name, match_names, order_of
from mmmilan.datasets.listing import list_folder
from mmmilan.datasets.object_formats import Part, box_of, coco_files, coco_parts, size_of
from mmmilan.datasets.pascal_voc import voc_files, voc_parts
from mmmilan.datasets.splits import choose_parts
from mmmilan.datasets.yolo import yolo_files, yolo_parts
from mmmilan.errors import InputError, count, listed
from mmmilan.files import extension

ROUNDING = 1.0  # pixels that a box may stick out of its image without a word
MISSING, UNREADABLE = 'left out (missing)', 'left out (does not decode)'
SIZES = 'of another size than the annotations say'
Coco = dict[str, list[dict[str, Any]]]


class Counts(dict):
    """What was counted: (thing, what about it) -> number and the first case."""

    def add(self, thing: str, what: str, case: str) -> None:
        """Count a case."""
        number, first = self.get((thing, what), (0, case))
        self[thing, what] = number + 1, first

    def lines(self, split: str) -> list[str]:
        """A line for each kind."""
        return [
            f'{split}: {count(number, thing)} {what}; the first is {first}.'
            for (thing, what), (number, first) in self.items()
        ]


def find_objects(root: Path) -> dict[str, Callable[[Names | None], list[Part]]]:
    """The formats of annotations of objects that a folder has, each with what gives its splits, by names of classes.

    Args:
        root: A folder, or the ``data.yaml`` or JSON file of one.
    """
    if root.is_file() and extension(root) not in ('.json', '.yaml', '.yml'):
        return {}
    formats = dict(COCO=coco_files(root), YOLO=yolo_files(root), VOC=voc_files(root))
    readers = dict(COCO=coco_parts, YOLO=yolo_parts, VOC=voc_parts)
    return {name: partial(readers[name], files, root) for name, files in formats.items() if files}


def read_objects(
    parts: Sequence[Part], given: Names | None, ignored: Sequence[str | int], evaluate: bool
) -> tuple[list[str], Coco, Coco, bool, list[str]]:
    """The two splits of annotated images.

    Args:
        parts: What the data have.
        given: Names of classes that were given.
        ignored: Classes whose objects are left out.
        evaluate: Whether only the split to validate on is read, in place of that to train on.

    Returns:
        Names of the classes; training and validation in COCO's format, where category ``label + 1`` is
        ``classes[label]`` (validation without images where the data have no split for it); whether each object has
        a mask; and lines about what was counted.

    Raises:
        InputError: see :mod:`mmmilan.datasets.labelled`.
    """
    roles = {role: [part for part in parts if part.role == role] for role in ('train', 'val', 'test', '')}
    train_parts, val_parts = choose_parts(roles, evaluate)
    unused = [part.where for part in parts if part not in train_parts and part not in val_parts]
    notes = [f'Not used: {listed(unused)}.'] * bool(unused)
    notes += dict.fromkeys(note for part in (*train_parts, *val_parts) for note in part.notes)
    contents = dict(train=[each.read() for each in train_parts], val=[each.read() for each in val_parts])
    where = dict(train=' and '.join(p.where for p in train_parts), val=' and '.join(p.where for p in val_parts))
    if val_parts is roles['test'] and not any(each['annotations'] for each in contents['val']):
        contents['val'] = []  # often kept back, as in competitions
        notes.append(f'Not used, as it has no objects: {where["val"]}.')
    classes = choose_classes(contents, where, given, ignored, notes)
    called = dict(train='test' if evaluate else 'train', val='val')
    splits = {name: clean(each, classes, called[name], where[name], notes) for name, each in contents.items() if each}
    note_files(splits, {image['file_name'] for part in chain(*contents.values()) for image in part['images']}, notes)
    masks = [bool(each['segmentation']) for split in splits.values() for each in split['annotations']]
    if any(masks) and not all(masks):
        notes.append(f'{masks.count(False)} of {len(masks)} objects have no mask: boxes alone are used.')
    for annotation in chain(*(split['annotations'] for split in splits.values())) if not all(masks) else ():
        del annotation['segmentation']
    return classes, splits['train'], splits.get('val', dict(images=[], annotations=[])), all(masks), notes


def choose_classes(
    contents: dict[str, list[Coco]], where: dict[str, str], given: Names | None, ignored: Sequence, notes: list[str]
) -> list[str]:
    """The names of the classes in the order of their labels: as they were given, or as the training split has them.

    Raises:
        InputError: names do not fit each other.
    """
    objects = {name: count_objects(each) for name, each in contents.items()}
    found = [name for name in category_names(contents['train']) if not is_umbrella(name, contents, objects)]
    for name in map(as_name, ignored):
        if name not in found:
            raise InputError(
                f'ignore names {name}, which is no class of {where["train"]} ({listed(found)}); correct it.'
            )
    if given and given.chosen and not set(given.names) <= set(found):
        match_names(given.names, found, given.where, where['train'], lambda: None)
    classes = [name for name in order_of(found, given, where['train'], notes) if name not in map(as_name, ignored)]
    if not (given and given.chosen):
        others = [name for name in category_names(contents['val']) if name not in found and objects['val'][name]]
        if others:
            names = [*found, *others]
            match_names(
                names,
                found,
                where['val'],
                where['train'],
                lambda: Counter({place: objects['val'][name] for place, name in enumerate(names)}),
            )
    return classes


def category_names(contents: Iterable[Coco]) -> list[str]:
    """The names of the categories of some files, each once."""
    return list(dict.fromkeys(as_name(each['name']) for content in contents for each in content['categories']))


def count_objects(contents: Iterable[Coco]) -> Counter[str]:
    """Number of objects by the name of their category."""
    counts: Counter[str] = Counter()
    for content in contents:
        names = {each['id']: as_name(each['name']) for each in content['categories']}
        counts.update(names[each['category_id']] for each in content['annotations'])
    return counts


def is_umbrella(name: str, contents: dict[str, list[Coco]], objects: dict[str, Counter[str]]) -> bool:
    """Whether a category without objects only stands above all others, as in files of Roboflow."""
    others = [
        each.get('supercategory')
        for content in chain(*contents.values())
        for each in content['categories']
        if as_name(each['name']) != name
    ]
    return bool(others) and set(others) == {name} and not any(counts[name] for counts in objects.values())


def clean(contents: Sequence[Coco], classes: Sequence[str], split: str, where: str, notes: list[str]) -> Coco:
    """One split in COCO's format with new ids; what cannot be used is left out and counted.

    Raises:
        InputError: images are missing, occur twice, or have another size than their annotations.
    """
    counts = Counts()
    images: list[dict] = []
    annotations: list[dict] = []
    label = {name: place for place, name in enumerate(classes)}
    for content in contents:
        names = {each['id']: as_name(each['name']) for each in content['categories']}
        numbers = {}
        for image in track(content['images'], 'Looking at images', transient=True):
            if size := checked_size(image, counts):
                numbers[image['id']] = len(images)
                images.append(dict(id=len(images), file_name=image['file_name'], width=size[0], height=size[1]))
        for annotation in content['annotations']:
            name, place = names[annotation['category_id']], numbers.get(annotation['image_id'])
            if place is None:
                continue
            if name not in label:
                counts.add('object', 'left out (of a class that is not used)', name)
            elif kept := checked_object(annotation, images[place], counts):
                annotations.append(kept | dict(id=len(annotations) + 1, image_id=place, category_id=label[name] + 1))
    check_images(images, counts, where)
    with_objects = {each['image_id'] for each in annotations}
    for image in images:
        if image['id'] not in with_objects:
            counts.add('image', 'without objects, kept as a negative', image['file_name'])
    notes += counts.lines(split)
    categories = [dict(id=place + 1, name=name) for place, name in enumerate(classes)]
    return dict(images=images, annotations=annotations, categories=categories)


def checked_size(image: dict, counts: Counts) -> tuple[int, int] | None:
    """Width and height of an image; None for one that is left out."""
    path = image['file_name']
    if not (size := size_of(path)):
        counts.add('image', UNREADABLE if os.path.exists(path) else MISSING, path)
        return None
    if size != (image.get('width', size[0]), image.get('height', size[1])):
        counts.add('image', SIZES, f'{path}, {size[0]} x {size[1]} and not {image["width"]} x {image["height"]}')
    return tuple(size)


def check_images(images: Sequence[dict], counts: Counts, where: str) -> None:
    """Raise an :class:`InputError` for a split whose images are missing, of another size, or there twice."""
    number, first = counts.get(('image', MISSING), (0, ''))
    if number > len(images):
        raise InputError(
            f'{number} of {number + len(images)} images of {where} are missing, the first is {first}; put the images '
            'beside the annotations.'
        )
    if ('image', SIZES) in counts:
        number, first = counts['image', SIZES]
        raise InputError(
            f'{where}: {number} of {len(images)} images are {SIZES}, the first is {first} (width x height); correct '
            'the sizes, or restore the images that were annotated.'
        )
    twice = [name for name, number in Counter(image['file_name'] for image in images).items() if number > 1]
    if twice:
        raise InputError(
            f'{where} has {count(len(twice), "image")} more than once, the first is {twice[0]}: objects of one entry '
            'would be background in the other; join their entries.'
        )


def checked_object(annotation: dict, image: dict, counts: Counts) -> dict | None:
    """An object cut at the border of the image; None for one that is left out.

    mmdet would leave out boxes of less than a pixel in silence.
    """
    case, size = image['file_name'], (image['width'], image['height'])
    box = list(map(float, annotation['bbox']))
    if not (box[2] >= 1 and box[3] >= 1):  # of numbers that are none, too
        return counts.add('object', 'left out (box of less than a pixel)', case)
    mask = annotation.get('segmentation') or []
    if isinstance(mask, list):
        polygons = [polygon for polygon in mask if len(polygon) >= 6]
        if any(mask) and not polygons:
            return counts.add('object', 'left out (polygon of less than three points)', case)
        mask = polygons
    extents = [box, box_of(mask)] if isinstance(mask, list) and mask else [box]
    if any(min(cut(each, size)[2:]) < 1 for each in extents):
        return counts.add('object', 'left out (outside the image)', case)
    if any(np.abs(np.subtract(each, cut(each, size))).max() > ROUNDING for each in extents):
        counts.add('object', 'cut at the border of the image', case)
        if isinstance(mask, list):  # far outside, a polygon would fill the memory
            mask = [np.clip(np.reshape(polygon, (-1, 2)), 0, size).ravel().tolist() for polygon in mask]
    box = cut(box, size)
    if crowd := any(annotation.get(key) in (1, '1') for key in ('iscrowd', 'ignore')):  # pandas writes NaN for none
        counts.add('object', 'neither trained on nor scored (a crowd, or difficult)', case)
    area = float(annotation['area']) or box[2] * box[3]
    return dict(bbox=box, area=area, iscrowd=int(crowd), segmentation=mask)


def cut(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """The part of a box x, y, width, height in an image of a (width, height); of negative size outside of it."""
    low, high = np.maximum(box[:2], 0), np.minimum(np.add(box[:2], box[2:]), size)
    return [*low.tolist(), *(high - low).tolist()]


def note_files(splits: dict[str, Coco], named: set[str], notes: list[str]) -> None:
    """Count the images that are in both splits, and those that lie beside others and that no annotations name."""
    files = [{image['file_name'] for image in split['images']} for split in splits.values()]
    if len(files) == 2 and (both := files[0] & files[1]):
        notes.append(
            f'{count(len(both), "image")} of val are in train too, which flatters the result: {listed(sorted(both))}.'
        )
    beside = (
        os.path.join(folder, file)
        for folder in sorted(filter(os.path.isdir, {os.path.dirname(file) for file in named if os.path.isabs(file)}))
        for file in list_folder(folder).files
        if '/' not in file
    )
    if unused := [file for file in beside if file not in named]:
        notes.append(f'{count(len(unused), "image")} without annotations not used: {listed(unused)}.')
