"""What formats of annotated objects have in common, and COCO's JSON; see ``yolo.py`` and ``pascal_voc.py`` too.

Each format becomes COCO's three lists, with absolute file names. What cannot be read is named by file and line.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmmilan.datasets.annotations import PARTS, check_coco, holds
from mmmilan.datasets.classes import Names, as_name
from mmmilan.datasets.decoding import EXTENSIONS, read_size
from mmmilan.datasets.listing import ANNOTATION_FOLDERS, list_annotated, remember
from mmmilan.datasets.splits import role_of
from mmmilan.errors import InputError, count, listed
from mmmilan.files import extension, first_line, read_lines

WHOLE = ('id', 'image_id', 'category_id', 'width', 'height')  # keys of COCO's format
# What a file in COCO's format has that annotates objects, or images without any.
COCO = [re.compile(rb'"%s"\s*:' % key.encode()) for key in PARTS]
COCO.append(re.compile(rb'"(bbox|segmentation)"\s*:|"annotations"\s*:\s*\[\s*\]'))


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
            return Sought([name], parent_folders(name), inside)
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
        found = {i: each.found for i, each in enumerate(sought)}

        def narrow(places: Sequence[int], test: Callable[[str, Sought], bool]) -> bool:
            """Keep the files that pass a test, if one of these images has any; and whether that is so."""
            kept = {i: [file for file in found[i] if test(file, sought[i])] for i in places}
            if told := any(kept.values()):
                found.update(kept)
            return told

        with_folders = [i for i, each in enumerate(sought) if each.folders]
        told = narrow(with_folders, lambda file, each: parent_folders(file)[-len(each.folders) :] == each.folders)
        others = [i for i, each in enumerate(sought) if len(found[i]) > 1 or not (told and each.folders)]
        narrow(others, lambda file, _: not any(map(ANNOTATION_FOLDERS.fullmatch, parent_folders(file))))
        narrow(others, lambda file, each: file.startswith(each.beside))
        narrow(others, lambda file, _: roles_of(os.path.dirname(file))[:1] == [role])
        for own in found.values():
            if len(own) > 1:
                raise InputError(
                    f'{self.root} has the image {os.path.basename(own[0])} in {len(own)} places ({listed(own)}); give '
                    'the images different names, or write their folders into the annotations.'
                )
        return [str(self.root / own[0]) if own else None for own in found.values()]


def parent_folders(file: str) -> list[str]:
    """The folders in the path of a file, as names are compared."""
    return as_name(file).split('/')[:-1]


def missing(name: str, path: Path) -> str:
    """What stands for the path of an image that is missing: no file, as one of that name may be another image."""
    return f'{name} of {path}'


def roles_of(file: str) -> list[str]:
    """The splits that the folders and the name of a file are called after, the innermost first."""
    return [role[0] for part in reversed(file.split('/')) if (role := role_of(part.rpartition('.')[0] or part))]


def size_of(image: str) -> tuple[int, int] | None:
    """The width and height of an image; None if it is missing or no image."""
    try:
        return remember(('size', image), lambda: read_size(image))
    except InputError:
        return None


def in_coco_format(images: Iterable[dict], names: Sequence[str], objects: Iterable[dict]) -> dict[str, Any]:
    """COCO's lists of images, whose ids are their places, and of objects."""
    return dict(
        images=[image | dict(id=place) for place, image in enumerate(images)],
        categories=[dict(id=number, name=name) for number, name in enumerate(names)],
        annotations=[each | dict(id=number) for number, each in enumerate(objects)],
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
