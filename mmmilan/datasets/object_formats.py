"""Annotations of objects as people have them: COCO's JSON, YOLO's text files, Pascal VOC's XML.

Each format becomes COCO's three lists, with absolute file names. What cannot be read is named by file and line.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml
from rich.progress import track

from mmmilan.datasets.annotations import LOOKED_AT, PARTS, check_coco, holds
from mmmilan.datasets.classes import Names, as_name, positions, read_names
from mmmilan.datasets.decoding import EXTENSIONS, read_size
from mmmilan.datasets.listing import ANNOTATION_FOLDERS, list_annotated, remember
from mmmilan.datasets.splits import role_of
from mmmilan.errors import InputError, count, listed
from mmmilan.files import decode_text, extension, first_line, read_lines, read_text

WHOLE = ('id', 'image_id', 'category_id', 'width', 'height')  # keys of COCO's format
# What a file in COCO's format has that annotates objects, or images without any.
COCO = [re.compile(rb'"%s"\s*:' % key.encode()) for key in PARTS]
COCO.append(re.compile(rb'"(bbox|segmentation)"\s*:|"annotations"\s*:\s*\[\s*\]'))
YAML_SPLITS = dict(train='train', val='val', valid='val', validation='val', test='test')


class Part(NamedTuple):
    """One split of annotations.

    Attributes:
        role: 'train', 'val', 'test', or '' where it has no name.
        where: The file or folder that has them, for messages.
        read: Gives them in COCO's format, with absolute file names; images may lack their size.
        notes: What is left out of them, a line each.
    """

    role: str
    where: str
    read: Callable[[], dict[str, Any]]
    notes: Sequence[str] = ()


def list_images_of(root: Path) -> list[str]:
    """The images of a folder, relative to it; shards are none that annotations could name."""
    return files_in(root, *EXTENSIONS)


def files_in(root: Path, *kinds: str) -> list[str]:
    """The files of some extensions in a folder, of images or of annotations, relative to it."""
    return [file for file in list_annotated(root).files if extension(file) in kinds]


def read_list(path: Path) -> list[str]:
    """The names in a text file, one a line, with / between folders."""
    return [line.replace('\\', '/') for line in read_lines(path)]


def stem_of(name: str) -> str:
    """What a file and its name in a list have in common: some tools write folders and an extension, others do not."""
    name = as_name(name.rpartition('/')[2])
    return name[: -len(end)] if (end := extension(name)) in (*EXTENSIONS, '.xml') else name


def by_lists(root: Path, kind: str, files: Sequence[str]) -> tuple[dict[str, list[int]], list[str]]:
    """How Pascal VOC's lists ``ImageSets/KIND/{train,val,test}.txt`` below a folder divide some of its files.

    Without a list ``train``, that is what ``trainval`` has and ``val`` has not.

    Returns:
        Split -> the places of its files, {} without a list for train; and lines about what the lists do not fit.

    Raises:
        InputError: a list to train or to validate on names none of the files, or cannot be read.
    """
    lists: dict[str, dict[str, str]] = {}  # split -> stem -> name
    for file in files_in(root, '.txt'):
        *folders, name = file.split('/')
        if folders[-2:] == ['ImageSets', kind] and (role := name[:-4]) in ('train', 'val', 'test', 'trainval'):
            lists.setdefault(role, {}).update({stem_of(entry): entry for entry in read_list(root / file)})
    both, called = lists.pop('trainval', None), 'train'
    if both and 'train' not in lists:
        lists['train'], called = {stem: both[stem] for stem in both if stem not in lists.get('val', ())}, 'trainval'
    if 'train' not in lists:
        return {}, []
    stems, notes = [stem_of(file) for file in files], []
    divided = {role: [i for i, stem in enumerate(stems) if stem in names] for role, names in lists.items()}
    for role, names in lists.items():
        file = called if role == 'train' else role
        where, lost = f'ImageSets/{kind}/{file}.txt', [names[stem] for stem in sorted(names.keys() - stems)]
        if not divided[role] and role != 'test':  # which is often kept back
            raise InputError(
                f'{root} has no file of the {count(len(names), "name")} in {where} ({listed(lost)}), where it has '
                f'{listed(stems)}; correct or remove this list.'
            )
        notes += [f'{count(len(lost), "name")} of {where} without a file: {listed(lost)}.'] * bool(lost)
    rest = set(range(len(files))).difference(*divided.values())
    unused = (
        f'{count(len(rest), "file")} in no list of ImageSets/{kind} not used: {listed(files[i] for i in sorted(rest))}.'
    )
    return divided, notes + [unused] * bool(rest)


class Sought(NamedTuple):
    """An image that annotations name.

    Attributes:
        found: The files that it may be, relative to the folder of the images.
        folders: Those that its name has.
        beside: The folder of the annotations, relative as ``found``, with / at its end; '' for that of the images.
    """

    found: list[str]
    folders: list[str]
    beside: str


class Images:
    """The images of a folder, to be found by what annotations call them.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.by_name: dict[str, list[str]] = defaultdict(list)
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for file in list_images_of(root):
            name = file.rpartition('/')[2]
            self.by_name[as_name(name)].append(file)
            self.by_stem[as_name(name.rpartition('.')[0])].append(file)

    def seek(self, name: str, beside: Path, stem: str = '') -> Sought:
        """Where an image may be.

        Args:
            name: Its file name in the annotations, perhaps with folders.
            beside: The folder of the annotation file.
            stem: The name without extension that rather is the image's, if there is such an image.
        """
        inside = '' if beside == self.root else f'{os.path.relpath(beside, self.root)}/'
        if own := self.by_stem.get(as_name(stem)):
            return Sought(own, [], inside)
        name = name.replace('\\', '/')
        if os.path.isabs(name) and os.path.isfile(name):
            name = os.path.relpath(name, self.root)
            return Sought([name], as_name(name).split('/')[:-1], inside)
        parts = [part for part in as_name(name).split('/') if part not in ('', '.', '..')]
        return Sought(self.by_name.get(parts[-1], []) if parts else [], parts[:-1], inside)

    def choose(self, sought: Sequence[Sought], role: str) -> list[str | None]:
        """The absolute path of each image of a split; None for one that is missing.

        It lies in the folders of its name, in none of label maps, beside the annotations, in the split: where that is
        so of some images it is so of all, as one that is missing may have the name of another one elsewhere.

        Args:
            sought: The images.
            role: The split.

        Raises:
            InputError: several folders have an image.
        """
        found = [each.found for each in sought]
        tests = (
            lambda file, folders, _: as_name(file).split('/')[:-1][-len(folders) :] == folders if folders else True,
            lambda file, *_: not any(map(ANNOTATION_FOLDERS.fullmatch, file.split('/')[:-1])),  # label maps
            lambda file, _, beside: file.startswith(beside),
            lambda file, *_: roles_of(os.path.dirname(file))[:1] == [role],
        )
        by_folders, waiting = tests[0], range(len(sought))
        for test in tests:
            kept = {i: [file for file in found[i] if test(file, *sought[i][1:])] for i in waiting}
            tells = any(own for i, own in kept.items() if test is not by_folders or sought[i].folders)
            for i, own in kept.items():
                found[i] = own if tells else own or found[i]
            if test is by_folders:
                waiting = [i for i in waiting if len(found[i]) > 1 or not sought[i].folders or not tells]
        for own in found:
            if len(own) > 1:
                raise InputError(
                    f'{self.root} has the image {os.path.basename(own[0])} in {len(own)} places ({listed(own)}); give '
                    'the images different names, or write their folders into the annotations.'
                )
        return [str(self.root / own[0]) if own else None for own in found]


def missing(name: str, path: Path) -> str:
    """What stands for the path of an image that is missing: no file, as one of that name may be another image."""
    return f'{name} of {path}'


def roles_of(file: str) -> list[str]:
    """The splits that the folders and the name of a file are called after, the innermost first."""
    return [role[0] for part in reversed(file.split('/')) if (role := role_of(part.rpartition('.')[0] or part))]


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


# -- COCO


def coco_files(root: Path) -> list[Path]:
    """JSON files of objects in COCO's format."""
    files = [root] if root.is_file() else [root / file for file in files_in(root, '.json')]
    return [file for file in files if extension(file) == '.json' and holds(file, *COCO)]


def coco_parts(files: list[Path], root: Path, given: Names | None) -> list[Part]:
    """The splits of COCO's files, named by the files or their folders."""
    folder = root if root.is_dir() else root.parent
    if root.is_file() and not list_images_of(folder):  # annotations/instances.json
        folder = folder.parent
    images = Images(folder)
    roles: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        roles[next(iter(roles_of(os.path.relpath(file, folder))), '')].append(file)
    parts = []
    for role, own in roles.items():
        own = [file for file in own if file.name.startswith('instances')] or own  # beside those of persons' keypoints
        if len(own) > 1:
            raise InputError(
                f'{root} has {len(own)} files of annotations{f" for {role}" * bool(role)}: {listed(map(str, own))}; '
                'name the one to use in place of the folder, or remove the others.'
            )
        parts.append(Part(role, str(own[0]), lambda role=role, path=own[0]: read_coco(path, role, images)))
    return parts


def read_coco(path: Path, role: str, images: Images) -> dict[str, Any]:
    """A file of annotations, completed and checked, with absolute file names."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON in COCO's format ({first_line(error)}); write it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in PARTS):
        raise InputError(f"{path} is not in COCO's format: {', '.join(PARTS)} must be lists; convert it.")
    if any(isinstance(each, dict) and 'segments_info' in each for each in content['annotations']):
        raise InputError(
            f"{path} is in COCO's panoptic format, whose objects are drawn in PNG files; give the file of instances, "
            'which has a box or a polygon of each.'
        )
    named = [each for each in content['images'] if isinstance(each, dict) and isinstance(each.get('file_name'), str)]
    found = images.choose([images.seek(image['file_name'], path.parent) for image in named], role)
    for image, file in zip(named, found, strict=True):
        image['file_name'] = file or missing(image['file_name'], path)
    complete_coco(content)
    check_coco(content, path)
    return content


def complete_coco(content: dict[str, Any]) -> None:
    """Add in place what tools leave out and the rest of a file tells: sizes, ids, areas, boxes of polygons.

    Ids and sizes that are whole numbers become integers.
    """
    images, _, annotations = every = [[e for e in content[part] if isinstance(e, dict)] for part in PARTS]
    for entry in chain(*every):
        for key in WHOLE:
            if isinstance(value := entry.get(key), float) and value.is_integer():  # pandas writes 1.0
                entry[key] = int(value)
    for image in images:
        if image.get('width') is None and image.get('height') is None:
            image['width'], image['height'] = size_of(str(image.get('file_name'))) or (1, 1)  # it will be left out
    for index, entry in enumerate(annotations):
        entry.setdefault('id', f'of entry {index}')
        mask = entry.get('segmentation')
        with suppress(TypeError, ValueError, LookupError):  # check_coco says what is wrong
            if entry.get('bbox') is None and mask:
                entry['bbox'] = box_of(mask)
            if not entry.get('area') or entry['area'] < 0:  # tools write -1 for what they do not know
                entry['area'] = (
                    area_of(mask) if isinstance(mask, list) and mask else entry['bbox'][2] * entry['bbox'][3]
                )


def box_of(polygons: list[list[float]]) -> list[float]:
    """The box x, y, width, height of polygons x, y, x, y, ..."""
    points = np.concatenate([np.asarray(polygon, float).reshape(-1, 2) for polygon in polygons])
    low, high = points.min(0), points.max(0)
    return [*low.tolist(), *(high - low).tolist()]


def area_of(polygons: list[list[float]]) -> float:
    """The area of polygons that do not cross, by the shoelace formula."""
    total = 0.0
    for polygon in polygons:
        x, y = np.asarray(polygon, float).reshape(-1, 2).T
        total += abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    return total


# -- YOLO


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
            partial(read_yolo, list(dict.fromkeys(images)), names, str(path), keypoints),
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
        Part(role, f'{role} of {root}' if role else str(root), partial(read_yolo, images, names, found.where))
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


def read_yolo(images: list[str], names: list[str], where: str, keypoints: int = 0) -> dict[str, Any]:
    """The objects of images, from their text files.

    Args:
        images: Paths of the images.
        names: Names of the classes.
        where: What has these names, for messages.
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
    if not texts:
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


def size_of(image: str) -> tuple[int, int] | None:
    """The width and height of an image; None if it is missing or no image."""
    try:
        return remember(('size', image), lambda: read_size(image))
    except InputError:
        return None


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


def in_coco_format(images: Iterable[dict], names: Sequence[str], objects: Iterable[dict]) -> dict[str, Any]:
    """COCO's lists of images, whose ids are their places, and of objects."""
    return dict(
        images=[image | dict(id=place) for place, image in enumerate(images)],
        categories=[dict(id=number, name=name) for number, name in enumerate(names)],
        annotations=[each | dict(id=number) for number, each in enumerate(objects)],
    )


# -- Pascal VOC


def voc_files(root: Path) -> list[Path]:
    """XML files of Pascal VOC."""
    files = [root / file for file in files_in(root, '.xml')] if root.is_dir() else []
    return [file for file in files if re.search(rb'<annotation[\s>]', head_of(file))]


def head_of(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open('rb') as file:
        return file.read(1000)


def voc_parts(files: list[Path], root: Path, given: Names | None) -> list[Part]:
    """The splits of Pascal VOC: by the lists in ``ImageSets/Main``, or else by folders."""
    images = Images(root)
    divided, notes = by_lists(root, 'Main', [str(file) for file in files])
    roles: dict[str, list[Path]] = defaultdict(list)
    roles.update({role: [files[i] for i in places] for role, places in divided.items() if places})
    for file in files if not divided else ():
        roles[next(iter(roles_of(os.path.relpath(file.parent, root))), '')].append(file)
    found = {as_name(each.findtext('name', '')) for file in files for each in voc_root(file).findall('object')}
    names = sorted(found - {''})
    return [
        Part(
            role,
            f'{role} of {root}' if role else str(root),
            lambda role=role, own=own: read_voc(own, names, role, images),
            notes,
        )
        for role, own in roles.items()
    ]


def voc_root(path: Path) -> ElementTree.Element:
    """What an XML file holds.

    Raises:
        InputError: it is no XML.
    """
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f'{path} cannot be read as XML ({first_line(error)}); write it again.') from error


def voc_text(element: ElementTree.Element, field: str) -> str:
    """What a field within an element of an XML file says."""
    if text := element.findtext(field):
        return text
    raise ValueError(f'Missing field {field!r}')


def voc_object(element: ElementTree.Element, names: list[str]) -> dict[str, Any]:
    """An object of an XML file, without the id of its image; a difficult one is ignored, as in Pascal VOC's scores."""
    name = voc_text(element, 'name')  # with the spaces of an editor around it
    if as_name(name) not in names:
        raise ValueError(f'Unknown category name {name!r}')
    left, top, right, bottom = (float(voc_text(element, f'bndbox/{side}')) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
    box = [left, top, right - left, bottom - top]
    ignored = element.findtext('difficult', '').strip() == '1'
    return dict(category_id=names.index(as_name(name)), bbox=box, area=box[2] * box[3], ignore=ignored)


def read_voc(files: list[Path], names: list[str], role: str, images: Images) -> dict[str, Any]:
    """The objects of XML files."""
    entries, objects, sought = [], [], []
    for file in track(files, 'Reading labels', transient=True):
        root = voc_root(file)
        try:
            name = voc_text(root, 'filename')
            width, height = (int(voc_text(root, f'size/{side}')) for side in ('width', 'height'))
            own = [voc_object(each, names) for each in root.findall('object')]
        except ValueError as error:
            raise InputError(
                f'{file} is not as Pascal VOC has it ({first_line(error)}); correct or remove it.'
            ) from error
        sought.append(images.seek(name, file.parent, file.stem))
        size = dict(width=width, height=height) if width > 0 and height > 0 else {}  # some tools write 0
        objects += [each | dict(image_id=len(entries)) for each in own]
        entries.append(dict(file_name=missing(name, file)) | size)
    for entry, path in zip(entries, images.choose(sought, role), strict=True):
        entry['file_name'] = path or entry['file_name']
    return in_coco_format(entries, names, objects)
