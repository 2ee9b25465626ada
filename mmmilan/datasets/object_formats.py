"""Annotations of objects as people have them: COCO's JSON, YOLO's text files, Pascal VOC's XML.

Each format becomes COCO's three lists, with absolute file names. The library labelformat reads YOLO and Pascal VOC;
what it would leave out in silence is looked for before. COCO's JSON is used as it is: crowds would be lost on the way.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml
from rich.progress import track

from mmmilan.datasets.annotations import LOOKED_AT, PARTS, check_coco
from mmmilan.datasets.classes import Names, as_name, listed, positions, read_names
from mmmilan.datasets.decoding import EXTENSIONS, read_size
from mmmilan.datasets.listing import ANNOTATION_FOLDERS, list_annotated, remember
from mmmilan.datasets.splits import role_of
from mmmilan.errors import InputError, count
from mmmilan.files import decode_text, extension, first_line, read_lines, read_text

WHOLE = ('id', 'image_id', 'category_id', 'width', 'height')  # keys of COCO's format
COCO_KEYS = [re.compile(rb'"%s"\s*:' % name.encode()) for name in PARTS]
BOXES = re.compile(rb'"(bbox|segmentation)"\s*:')
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

    def find(self, name: str, role: str, beside: Path) -> str | None:
        """The absolute path of the image that an annotation file calls ``name``; None if it is missing.

        Args:
            name: A file name, perhaps with folders.
            role: Of the split, which decides between folders of splits.
            beside: The folder of the annotation file, which decides first.

        Raises:
            InputError: several folders have it.
        """
        name = name.replace('\\', '/')
        if os.path.isabs(name) and os.path.isfile(name):
            return name
        parts = [part for part in as_name(name).split('/') if part not in ('', '.', '..')]
        found = self.by_name.get(parts[-1], []) if parts else []
        return self.choose(found, parts, role, beside)

    def choose(self, found: list[str], parts: list[str], role: str, beside: Path) -> str | None:
        """The one of some images of the same name that is meant, see :meth:`find`."""
        if not found:
            return None
        inside = f'{os.path.relpath(beside, self.root)}/'
        tests = (
            lambda file: as_name(file).split('/')[-len(parts) :] == parts,
            lambda file: file.startswith(inside),
            lambda file: roles_of(file)[:1] == [role],
            lambda file: not any(map(ANNOTATION_FOLDERS.fullmatch, file.split('/')[:-1])),  # label maps
        )
        for test in tests:
            found = list(filter(test, found)) or found
        if len(found) > 1:
            raise InputError(
                f'{self.root} has the image {parts[-1]} in {len(found)} places ({listed(found)}); give the images '
                'different names, or write their folders into the annotations.'
            )
        return str(self.root / found[0])


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


def require_labelformat(where: str | os.PathLike) -> None:
    """Check that the library which reads YOLO and Pascal VOC is installed."""
    if not find_spec('labelformat'):
        raise InputError(f'{where} is read by the package labelformat, which is missing; pip install labelformat.')


# -- COCO


def coco_files(root: Path) -> list[Path]:
    """JSON files of objects in COCO's format."""
    files = [root] if root.is_file() else [root / file for file in files_in(root, '.json')]
    return [file for file in files if extension(file) == '.json' and is_coco(file)]


def is_coco(path: Path) -> bool:
    """Whether a file has COCO's lists, with boxes or masks; as fast as it is read."""
    with path.open('rb') as file, suppress(ValueError), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(key.search(content) for key in COCO_KEYS) and BOXES.search(content) is not None
    return False  # an empty file


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
    for image in content['images']:
        if isinstance(image, dict) and isinstance(name := image.get('file_name'), str):
            image['file_name'] = images.find(name, role, path.parent) or str(path.parent / name)
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


class Texts:
    """YOLO's text files in place of their folder: labelformat opens them as paths, by the names of the images."""

    def __init__(self, rows: dict[str, list[list[str]]], image: str = '') -> None:
        self.rows, self.image = rows, image

    def __truediv__(self, image: str) -> Texts:
        return Texts(self.rows, image)

    def with_suffix(self, suffix: str) -> Texts:
        return self

    def exists(self) -> bool:
        return True

    def open(self) -> io.StringIO:
        return io.StringIO('\n'.join(map(' '.join, self.rows[self.image])))


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
    """The objects of images, as labelformat reads them from the text files of the images.

    Args:
        images: Paths of the images.
        names: Names of the classes.
        where: What has these names, for messages.
        keypoints: How many numbers stand behind a box, which are left out.
    """
    require_labelformat(where)
    from labelformat.formats import YOLOv8InstanceSegmentationInput, YOLOv8ObjectDetectionInput
    from labelformat.model.image import Image

    rows: dict[str, list[list[str]]] = {}  # of each image that has a text file
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
    with_masks = has_polygons({text: rows[image] for text, image in texts.items()})
    base = YOLOv8InstanceSegmentationInput if with_masks else YOLOv8ObjectDetectionInput

    class Reader(base):
        def __init__(self) -> None:
            self._config_data = dict(names=names)

        def get_images(self) -> Iterator[Image]:
            for image in rows:
                if size := size_of(image):
                    yield Image(places[image], image, *size)

        def _labels_dir(self) -> Texts:
            return Texts(rows)

    places = {image: place for place, image in enumerate(images)}
    return in_coco_format(images, names, Reader().get_labels())


def size_of(image: str) -> tuple[int, int] | None:
    """The width and height of an image; None if it is missing or no image."""
    try:
        return remember(('size', image), lambda: read_size(image))
    except InputError:
        return None


def yolo_rows(path: str, names: Sequence[str], where: str, keypoints: int) -> list[list[str]]:
    """The rows of a text file without keypoints; labelformat would leave out wrong ones.

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
        rows.append([str(int(values[0])), *cells[1:]])
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


def has_polygons(rows: dict[str, list[list[str]]]) -> bool:
    """Whether the rows of text files are polygons.

    Raises:
        InputError: some are, and some are not.
    """
    kinds: dict[bool, str] = {}
    for path, own in rows.items():
        for number, row in enumerate(own, 1):
            kinds.setdefault(len(row) > 5, f'{path}, row {number},')
    if len(kinds) == 2:
        raise InputError(
            f'{kinds[False]} has 4 numbers, a box or a polygon of two points, where others are polygons, as '
            f'{kinds[True]} is; give each object three points or more, or write all of them as boxes.'
        )
    return kinds == {} or next(iter(kinds))


def in_coco_format(images: Sequence[str], names: Sequence[str], labels: Iterable[Any]) -> dict[str, Any]:
    """COCO's lists of what labelformat reads; the id of its images is their place in ``images``."""
    from labelformat.model.bounding_box import BoundingBoxFormat

    annotations = []
    for label in labels:
        for thing in label.objects:
            polygons = [
                np.ravel(each).tolist() for each in getattr(getattr(thing, 'segmentation', None), 'polygons', ())
            ]
            box = box_of(polygons) if polygons else thing.box.to_format(BoundingBoxFormat.XYWH)
            entry = dict(id=len(annotations), image_id=label.image.id, category_id=thing.category.id, bbox=box)
            entry |= dict(segmentation=polygons, area=area_of(polygons)) if polygons else dict(area=box[2] * box[3])
            annotations.append(entry)
    return dict(
        images=[dict(id=place, file_name=image) for place, image in enumerate(images)],
        categories=[dict(id=number, name=name) for number, name in enumerate(names)],
        annotations=annotations,
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
    spellings = {name for file in files for name in voc_texts(file, 'name')}
    return [
        Part(
            role,
            f'{role} of {root}' if role else str(root),
            lambda role=role, own=own: read_voc(own, spellings, role, images),
            notes,
        )
        for role, own in roles.items()
    ]


def voc_texts(path: Path, field: str) -> list[str]:
    """What a field of each object in an XML file says, with the spaces of an editor around it; '' without the field.

    Raises:
        InputError: it is no XML.
    """
    try:
        return [each.findtext(field, '') for each in ElementTree.parse(path).getroot().findall('object')]
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f'{path} cannot be read as XML ({first_line(error)}); write it again.') from error


def read_voc(files: list[Path], spellings: set[str], role: str, images: Images) -> dict[str, Any]:
    """The objects of XML files, as labelformat reads them."""
    require_labelformat(images.root)
    from labelformat.formats import PascalVOCObjectDetectionInput
    from labelformat.model.category import Category
    from labelformat.types import ParseError

    reader = PascalVOCObjectDetectionInput(images.root, '')
    names = sorted(set(map(as_name, spellings)) - {''})
    # labelformat compares the texts; names may have commas
    reader._categories = [Category(names.index(name), each) for each in spellings if (name := as_name(each))]
    paths, labels, difficult = [], [], []
    for file in track(files, 'Reading labels', transient=True):
        reader._input_folder = SimpleNamespace(glob=lambda pattern, file=file: [file])
        try:
            (label,) = reader.get_labels()
        except (ParseError, ValueError) as error:
            reason = first_line(error).rpartition('xml: ')[2]
            raise InputError(f'{file} is not as Pascal VOC has it ({reason}); correct or remove it.') from error
        name = label.image.filename
        stem = [path for path in images.by_stem.get(as_name(file.stem), [])]
        path = images.choose(stem, [file.stem], role, file.parent) or images.find(name, role, file.parent)
        labels.append(replace(label, image=replace(label.image, id=len(paths))))
        paths.append(path or str(file.parent / name))
        difficult += [text.strip() == '1' for text in voc_texts(file, 'difficult')]
    content = in_coco_format(paths, names, labels)
    for annotation, ignored in zip(content['annotations'], difficult, strict=True):
        annotation['ignore'] = ignored  # as those who score Pascal VOC do
    for image, label in zip(content['images'], labels, strict=True):
        if label.image.width > 0 and label.image.height > 0:  # some tools write 0
            image |= dict(width=label.image.width, height=label.image.height)
    return content
