"""Annotations of objects in YOLO's text files, with ``data.yaml`` or without."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.progress import track

from mmmilan.datasets.annotations import LOOKED_AT
from mmmilan.datasets.classes import Names, as_name, positions, read_names
from mmmilan.datasets.object_formats import (
    Part,
    area_of,
    box_of,
    files_in,
    in_coco_format,
    list_images_of,
    read_list,
    roles_of,
    size_of,
)
from mmmilan.errors import InputError, count, listed
from mmmilan.files import decode_text, extension, first_line, read_lines, read_text

YAML_SPLITS = dict(train='train', val='val', valid='val', validation='val', test='test')


def yolo_files(root: Path) -> list[Path]:
    """The ``data.yaml`` of a folder, or else the folder itself where text files with rows of numbers lie by images."""
    files = [root] if root.is_file() else [root / file for file in files_in(root, '.yaml', '.yml')]
    found = [file for file in files if extension(file) in ('.yaml', '.yml') and is_data_yaml(read_yaml(file))]
    if found or root.is_file():
        return found
    texts = {str(root / file) for file in files_in(root, '.txt')}
    images = (str(root / file) for file in list_images_of(root)) if texts else ()
    beside = (next((text for text in label_paths(image) if text in texts), None) for image in images)
    return [root] if any(map(has_rows, islice(filter(None, beside), LOOKED_AT))) else []


def has_rows(text: str) -> bool:
    """Whether a text file begins with a row of five numbers or more: captions lie beside images, too."""
    with suppress(ValueError, IndexError):  # no text, or an empty one
        return len(list(map(float, read_lines(text)[0].split()))) >= 5
    return False


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, all values as text; None if it has nothing of a data set.

    Raises:
        InputError: it has names of classes and a fault.
    """
    content = b''
    try:
        content = path.read_bytes()
        return yaml.load(decode_text(content), yaml.BaseLoader)  # a class may be called no, on or 1
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if re.search(rb'^\s*(names|nc)\s*:', content, re.MULTILINE):
            raise InputError(f'{path} cannot be read as YAML ({first_line(error)}); correct it.') from error
        return None


def is_data_yaml(content: Any) -> bool:
    """Whether a YAML file is that of a data set."""
    return isinstance(content, dict) and bool({'names', 'nc'} & set(content)) and bool(set(YAML_SPLITS) & set(content))


def yolo_parts(files: list[Path], root: Path, given: Names | None) -> list[Part]:
    """The splits that ``data.yaml`` names; without one, those of folders."""
    if len(files) > 1:
        raise InputError(
            f'{root} has {len(files)} files like data.yaml: {listed(map(str, files))}; name the one to use.'
        )
    path = files[0]
    if path.is_dir():
        return yolo_folders(path, given)
    content = read_yaml(path)
    names = yolo_names(content.get('names'), str(path))
    if str(content.get('nc', len(names))) != str(len(names)):
        raise InputError(f'{path} has nc: {content["nc"]}, but {len(names)} names; correct one of them.')
    splits: dict[str, list[str]] = {}
    for key, role in YAML_SPLITS.items():
        if content.get(key) not in (None, '', 'null', '~', []):
            splits.setdefault(role, []).extend(yolo_images(content, key, path))
    if 'train' not in splits:
        raise InputError(f'{path} has no train; name the folder of the images to train on.')
    for role in ('val', 'test'):
        if set(splits.get(role, ())) == set(splits['train']):  # as in coco128.yaml
            del splits[role]
    keypoints = yolo_keypoints(content, path)
    notes = [f'Keypoints, which {path} has by its kpt_shape, are left out: boxes alone are used.'] * bool(keypoints)
    return [
        Part(
            role,
            f'{role} of {path}',
            partial(read_yolo, list(dict.fromkeys(images)), names, str(path), role, keypoints),
            notes,
        )
        for role, images in splits.items()
    ]


def yolo_keypoints(content: dict, path: Path) -> int:
    """How many numbers of keypoints stand behind the box in a row; 0 without ``kpt_shape``, or an empty one."""
    shape = content.get('kpt_shape')
    if shape in (None, '', 'null', '~', []):
        return 0
    try:
        points, numbers = map(int, shape if isinstance(shape, list) else ())
        return points * numbers
    except (TypeError, ValueError):
        raise InputError(f'{path} has kpt_shape: {shape}; write two numbers, as [17, 3], or remove it.') from None


def yolo_folders(root: Path, given: Names | None) -> list[Part]:
    """The splits of images that have text files but no ``data.yaml``."""
    files = [root / 'obj.names', *(root / file for file in files_in(root, '.txt') if file.endswith('/classes.txt'))]
    found = given or next((read_names(file, False) for file in files if file.is_file()), None)
    if found is None:
        raise InputError(
            f'{root} has rows of boxes in text files, but no names of their classes; write data.yaml with names, train '
            'and val, or classes.txt with one name a line.'
        )
    names = yolo_names(found.numbered, found.where)
    splits: dict[str, list[str]] = defaultdict(list)
    for file in list_images_of(root):
        splits[next(iter(roles_of(os.path.dirname(file))), '')].append(str(root / file))
    return [
        Part(role, f'{role} of {root}' if role else str(root), partial(read_yolo, images, names, found.where, role))
        for role, images in splits.items()
    ]


def yolo_names(names: Any, where: str) -> list[str]:
    """The names of ``data.yaml``, a list or a dictionary from 0 on, in their order.

    Raises:
        InputError: they are something else, or have a gap.
    """
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        names = {int(number): as_name(name) for number, name in names.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(f'{where} has names that are no list; write names: [cat, dog].') from None
    if sorted(names) != list(range(len(names))):
        raise InputError(
            f'{where} numbers its {len(names)} names {listed(map(str, sorted(names)))}, and not 0 to {len(names) - 1} '
            'without a gap; correct them.'
        )
    names = [names[number] for number in range(len(names))]
    positions(names, where)
    return names


def yolo_images(content: dict, key: str, path: Path) -> list[str]:
    """The images of a split of ``data.yaml``: of a folder, of a text file that lists them, or of several.

    Raises:
        InputError: one of them does not exist, or all are empty.
    """
    entries = content[key] if isinstance(content[key], list) else [content[key]]
    images: list[str] = []
    for entry in map(str, entries):
        tried = yolo_places(content, entry, path)
        place = next((place for place in tried if place.exists()), None)
        if place is None:
            raise InputError(
                f'{path} has {key}: {entry}, which does not exist ({listed(map(str, tried))}); correct path or {key}.'
            )
        if extension(place) == '.txt':
            named = [os.path.normpath(place.parent / name) for name in read_list(place)]
            if not any(map(os.path.isfile, named)):
                raise InputError(
                    f'{place} names {count(len(named), "image")}, of which none exists ({listed(named)}); write paths '
                    'from the folder of this list on.'
                )
            images += named  # those that are missing are counted once all are looked at
        else:
            images += [str(place / file) for file in list_images_of(place)] if place.is_dir() else [str(place)]
    if not images:
        raise InputError(
            f'{path} has {key}: {", ".join(map(str, entries))}, which holds no image; correct path or {key}.'
        )
    return images


def yolo_places(content: dict, entry: str, path: Path) -> list[Path]:
    """Where a folder that ``data.yaml`` names may be: below ``path``, beside the file, or, from Roboflow, below it."""
    bases = [path.parent / str(content['path'])] if content.get('path') else []
    bases.append(path.parent)
    places = [base / entry for base in bases]
    if entry.startswith('../'):
        places.append(path.parent / entry[3:])
    return [Path(os.path.normpath(place)) for place in places]


def label_paths(image: str) -> list[str]:
    """Where the text file of an image may be: in ``labels`` in place of the last ``images``, or beside it."""
    stem = image.rpartition('.')[0]
    before, folder, after = stem.rpartition('/images/')
    places = [f'{before}/labels/{after}', stem] if folder else [stem]
    return [place + ending for place in places for ending in ('.txt', '.TXT')]


def read_yolo(images: list[str], names: list[str], where: str, role: str, keypoints: int = 0) -> dict[str, Any]:
    """The objects of images, from their text files.

    Args:
        images: Paths of the images.
        names: Names of the classes.
        where: What has these names, for messages.
        role: The split; a test may have no text file.
        keypoints: How many numbers stand behind a box, which are left out.
    """
    rows: dict[str, list[list[float]]] = {}  # of each image that has a text file
    texts: dict[str, str] = {}
    for image in track(images, 'Reading labels', transient=True):
        text = next((path for path in label_paths(image) if os.path.isfile(path)), None)
        if text:
            if text in texts:
                raise InputError(f'{text} belongs to {texts[text]} and to {image}; give the images different names.')
            texts[text] = image
            rows[image] = yolo_rows(text, names, where, keypoints)
    if not texts and role != 'test':
        raise InputError(
            f'Of {count(len(images), "image")} of {where} none has a text file, as {label_paths(images[0])[0]}; put '
            'the folder labels beside images.'
        )
    check_kinds({text: rows[image] for text, image in texts.items()})
    objects = [
        dict(image_id=place, category_id=int(label)) | yolo_object(numbers, size)
        for place, image in enumerate(images)
        if rows.get(image) and (size := size_of(image))
        for label, *numbers in rows[image]
    ]
    return in_coco_format([dict(file_name=image) for image in images], names, objects)


def yolo_object(numbers: list[float], size: tuple[int, int]) -> dict[str, Any]:
    """The box of a row, or its polygon with its box, in pixels of an image of this width and height."""
    points = np.reshape(numbers, (-1, 2)) * size
    if len(points) > 2:
        polygon = points.ravel().tolist()
        return dict(bbox=box_of([polygon]), segmentation=[polygon], area=area_of([polygon]))
    centre, sides = points
    return dict(bbox=[*(centre - sides / 2).tolist(), *sides.tolist()], area=float(sides.prod()))


def yolo_rows(path: str, names: Sequence[str], where: str, keypoints: int) -> list[list[float]]:
    """The rows of a text file without keypoints: class, then box or polygon in shares of the image.

    Raises:
        InputError: a row is neither a box nor a polygon of a known class.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        cells = line.split()
        if not cells:
            continue
        if keypoints and len(cells) == 5 + keypoints:  # an even number of them would be a polygon
            cells = cells[:5]
        try:
            values = list(map(float, cells))
            fault = row_fault(values, names, where)
        except ValueError:
            fault = f'is no row of numbers ({line.strip()[:40]})'
        if fault:
            raise InputError(f'{path}, line {number}, {fault}; correct or remove it.')
        rows.append(values)
    return rows


def row_fault(values: list[float], names: Sequence[str], where: str) -> str:
    """What is wrong with the numbers of a row; '' if nothing is."""
    if not all(map(math.isfinite, values)):
        return 'has a number that is not finite'
    if values[0] not in range(len(names)):
        return f'has the class {values[0]:g}, where {where} names {len(names)}, 0 to {len(names) - 1}'
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        return (
            f'has {len(values) - 1} numbers after the class, neither a box (4) nor a polygon of three points or more '
            '(an even number from 6 on)'
        )
    if max(values[1:]) > 2 or min(values[1:]) < -1:
        return 'has coordinates in pixels, where shares of the width and height of the image, 0 to 1, are expected'
    return ''


def check_kinds(rows: dict[str, list[list[float]]]) -> None:
    """Raise an :class:`InputError` if some of the rows of text files are polygons, and some are boxes."""
    kinds: dict[bool, str] = {}
    for path, own in rows.items():
        for number, row in enumerate(own, 1):
            kinds.setdefault(len(row) > 5, f'{path}, row {number},')
    if len(kinds) == 2:
        raise InputError(
            f'{kinds[False]} has 4 numbers, a box or a polygon of two points, where others are polygons, as '
            f'{kinds[True]} is; give each object three points or more, or write all of them as boxes.'
        )
