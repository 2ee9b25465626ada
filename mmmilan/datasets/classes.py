"""Classes are names: the data sets of a run, their files and its checkpoint number them alike, whatever their order.

A class has the same number everywhere in a run: its place among the names of the training split, or of the checkpoint
that is tested. What only one side has is an error, or a warning where no image can get a wrong label.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.dataset import BaseDataset
from torch.utils.data import Dataset

from mmmilan.errors import InputError, listed, warn
from mmmilan.files import extension, first_line, read_text

IGNORE = 255  # label of pixels without a class
NAME_FILES = ('classes.txt', 'classes.json', 'class_dict.csv', 'labelmap.txt', '_classes.csv')
ENDINGS = ('.txt', '.json', '.csv')  # of files of names


def as_name(name: Any) -> str:
    """A name with composed accents (NFC), which systems store as different characters, and without spaces around it."""
    return unicodedata.normalize('NFC', str(name)).strip()


def positions(names: Iterable[str], where: str) -> dict[str, int]:
    """The place of each name.

    Args:
        names: Names of classes.
        where: What has these names, for the error.

    Raises:
        InputError: a name stands there twice.
    """
    names = [as_name(name) for name in names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f'{where} names the class {listed(twice)} twice; give each class a name of its own.')
    return {name: place for place, name in enumerate(names)}


def match_names(
    names: Sequence[str], classes: Sequence[str], where: str, source: str, count: Callable[[], Counter | None]
) -> list[int | None]:
    """The number of each name among the classes.

    Args:
        names: Names of classes in any order.
        classes: The names that define the numbers.
        where: What has ``names``, for messages.
        source: What has ``classes``.
        count: Gives how many images or objects there are of each of ``names``, by its place; None if that is unknown.

    Returns:
        Numbers; None for a name without an image that is none of the classes.

    Raises:
        InputError: images have a class that is none of the classes, or a name stands there twice.
    """
    own, known = positions(names, where), positions(classes, source)
    extra = [name for name in own if name not in known]
    counts = count() if extra else None
    used = [name for name in extra if counts is None or counts[own[name]]]
    if used:
        amounts = [f'{name} ({counts[own[name]]} samples)' if counts else name for name in used]
        near = difflib.get_close_matches(used[0].casefold(), [name.casefold() for name in known], n=1)
        nearest = next((f' (is {name} meant by {used[0]}?)' for name in known if name.casefold() in near), '')
        raise InputError(
            f'{where} has {len(used)} of its {len(own)} classes, {listed(amounts)}, where {source} has '
            f'{listed(known)}{nearest}; rename or remove what does not belong there, or give both the same classes.'
        )
    lacking = [name for name in known if name not in own]
    if lacking:
        warn(
            f'{where} lacks {len(lacking)} of the {len(known)} classes of {source}: {listed(lacking)}. The others are '
            'matched by name.'
        )
    return [known.get(name) for name in own]


# -- data sets


def datasets_in(dataset: Dataset) -> Iterator[Dataset]:
    """A data set and, of a wrapper, the data sets in it."""
    yield dataset
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    for each in inner:
        if each is not None:
            yield from datasets_in(each)


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """The names of the classes of a data set, in the order of its labels; () if it has none.

    mmpretrain's data sets of class folders may have other names for show: here the folders count.
    """
    folders = getattr(dataset, 'folder_to_idx', None)
    return wordnet_ids(folders or (getattr(dataset, 'metainfo', None) or {}).get('classes') or ())


def wordnet_ids(classes: Iterable[str]) -> tuple[str, ...]:
    """Names of classes; for mmpretrain's 1000 of ImageNet-1k, of which some are equal, the names of the folders."""
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    classes = tuple(classes)
    if classes != tuple(IMAGENET_CATEGORIES):
        return classes
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo('imagenet-1k').label_names())


def use_classes(dataset: Dataset, classes: Sequence[str], source: str) -> None:
    """Number the labels of a data set by the place of their classes among ``classes``.

    Args:
        dataset: A data set of MMEngine, or a wrapper of some.
        classes: The names that define the numbers, see :func:`class_names`.
        source: What has these names, for messages.

    Raises:
        InputError: see :func:`match_names`, and :func:`check_numbers` for one without names.
    """
    classes, changed = tuple(classes), False
    for part in datasets_in(dataset):
        own = class_names(part)
        if isinstance(part, BaseDataset) and own and own != classes:
            table = match_names(own, classes, locate(part), source, lambda part=part: count_labels(part))
            if table != list(range(len(own))):
                rewrite(part, lambda entry, table=table: renumber(entry, table))
            changed = True
        elif isinstance(part, BaseDataset) and not own and len(part):
            check_numbers(part, classes, source)
    for part in datasets_in(dataset):
        metainfo = getattr(part, '_metainfo', None)
        if changed and metainfo and metainfo.get('classes'):
            metainfo['classes'] = classes
            if getattr(part, 'folder_to_idx', None):
                part.folder_to_idx = positions(classes, source)


def check_numbers(dataset: BaseDataset, classes: Sequence[str], source: str) -> None:
    """Compare the labels of a data set that names no classes with the classes by the folders of its images.

    Raises:
        InputError: an image in the folder of a class has the number of another, or there is no class of a number.
    """
    if type(dataset.get_data_info(0).get('gt_label')) is not int:
        return
    known, where = positions(classes, source), locate(dataset)
    for entry in map(dataset.get_data_info, range(len(dataset))):
        label = entry['gt_label']
        folder = as_name(os.path.basename(os.path.dirname(str(entry.get('img_path')))))
        if known.get(folder, label) != label or not 0 <= label < len(classes):
            meant = classes[label] if 0 <= label < len(classes) else 'none'
            raise InputError(
                f'{where} names no classes, and gives {entry.get("img_path")} the label {label}, which is {meant} of '
                f'{source} ({listed(classes)}); name its classes in their order by metainfo.classes.'
            )
    warn(
        f'{where} names no classes; its labels are taken as those of {source}, in this order: {listed(classes)}. '
        'metainfo.classes names them.'
    )


def locate(dataset: Dataset) -> str:
    """The file or folder that a data set reads."""
    prefix = getattr(dataset, 'data_prefix', None) or {}
    paths = [*(getattr(dataset, 'metainfo', None) or {}).get('sources', ())]
    paths += [getattr(dataset, 'ann_file', ''), prefix.get('seg_map_path'), *prefix.values()]
    paths += [getattr(dataset, 'data_root', None)]
    return next((os.fspath(path) for path in paths if path), type(dataset).__name__)


def labels_of(entry: dict) -> list[int]:
    """The labels in an entry of a data set of images or objects."""
    label = entry.get('gt_label', [])
    return [*(label if isinstance(label, (list, tuple)) else [label])] + [
        instance['bbox_label'] for instance in entry.get('instances', [])
    ]


def count_labels(dataset: BaseDataset) -> Counter | None:
    """How many images or objects there are of each label; None if only the label maps tell."""
    entries = [dataset.get_data_info(index) for index in range(len(dataset))]
    if any('seg_map_path' in entry and 'instances' not in entry for entry in entries):
        return None
    return Counter(label for entry in entries for label in labels_of(entry))


def renumber(entry: dict, table: Sequence[int | None]) -> None:
    """Replace each label in an entry of a data set by ``table[label]``; pixels of a label without one are ignored."""
    if 'gt_label' in entry:
        label = entry['gt_label']
        several = isinstance(label, (list, tuple))
        entry['gt_label'] = [table[each] for each in label] if several else table[label]
    for instance in entry.get('instances', []):
        instance['bbox_label'] = table[instance['bbox_label']]
    if entry.get('seg_map_path') and 'instances' not in entry:
        new = {place: number for place, number in enumerate(table) if number is not None}
        old = {place: place for place in range(len(table))} | (entry.get('label_map') or {})
        entry['label_map'] = {label: new.get(place, IGNORE) for label, place in old.items()}


def rewrite(dataset: BaseDataset, change: Callable[[dict], None]) -> None:
    """Change the entries of a data set of MMEngine, each in place."""
    entries = [dataset.get_data_info(index) for index in range(len(dataset))]
    for entry in entries:
        change(entry)
    dataset.data_list = entries
    if dataset.serialize_data:
        dataset.data_bytes, dataset.data_address = dataset._serialize_data()


# -- files of names


def read_class_names(path: Path) -> list[str]:
    """Names of classes in the order of their labels from a table.

    Args:
        path: A text with one name a line, where a number may stand before the name, or ADE20K's ``objectInfo150.txt``;
            or JSON: a list of names, of ``{"id": ..., "name": ...}``, or a dictionary between numbers and names.

    Raises:
        InputError: it is none of these, or the numbers have a gap.
    """
    text = read_text(path)
    with readable(path):
        pairs = json_names(json.loads(text)) if extension(path) == '.json' else text_names(text)
    numbers = sorted(pairs)
    if not numbers or numbers[0] not in (0, 1) or numbers[-1] - numbers[0] + 1 != len(numbers):
        raise InputError(f'{path} does not number its {len(numbers)} classes without a gap from 0 or 1; correct it.')
    names = [as_name(pairs[number]) for number in numbers]
    positions(names, str(path))
    return names


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors while a table is read into an ``InputError``."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f'{path} cannot be read as names of classes ({first_line(error)}); give a text with one name a line.'
        ) from error


def json_names(content: Any) -> dict[int, str]:
    """Number -> name from a table in JSON."""
    if isinstance(content, dict):
        content = content.get('categories', content)
    if isinstance(content, dict):
        turned = all(isinstance(value, int) for value in content.values())
        return {int(b if turned else a): str(a if turned else b) for a, b in content.items()}
    if all(isinstance(each, str) for each in content):
        return dict(enumerate(content))
    return {int(each['id']): str(each['name']) for each in content}


def text_names(text: str) -> dict[int, str]:
    """Number -> name from lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].split('\t')[0] == 'Idx':  # ADE20K: Idx, Ratio, Train, Val, Stuff, Name
        cells = [line.split('\t') for line in lines[1:]]
        return {int(row[0]): row[-1] for row in cells}
    if len(lines) > 1 and re.fullmatch(r'pixel value\s*,\s*class', lines[0].casefold()):  # Roboflow
        del lines[0]
    matches = [re.fullmatch(r'(\d+)[\s:,;]+(.+)', line) for line in lines]
    if lines and all(matches):
        numbers = [int(match[1]) for match in matches]
        rising = all(before < after for before, after in zip(numbers, numbers[1:], strict=False))
        if rising and len({match[2] for match in matches}) == len(lines) and (len(lines) > 1 or numbers[0] < 2):
            return {int(match[1]): match[2] for match in matches}
    return dict(enumerate(lines))


# -- names that a data set comes with


class Names(NamedTuple):
    """Names of classes that the user gave, or that lie beside the images.

    Attributes:
        numbered: Number -> name, from 0 where the names have no numbers.
        where: The option or file that has them.
        chosen: Whether the user gave them.
        colours: Number -> [R, G, B], of names that have one.
        counted: Whether the names have no numbers of their own.
    """

    numbered: dict[int, str]
    where: str
    chosen: bool
    colours: dict[int, list[int]] = {}
    counted: bool = False

    @property
    def names(self) -> list[str]:
        """The names in the order of their numbers."""
        return [self.numbered[number] for number in sorted(self.numbered)]


def names_of(folders: Sequence[Path], classes: Sequence[str] | str | os.PathLike | None) -> Names | None:
    """The names that were given, or those of a file ``NAME_FILES`` in the first folder that has one; None without.

    Raises:
        InputError: they cannot be read, or a name stands there twice.
    """
    if classes is None:
        paths = (folder / name for folder in folders for name in NAME_FILES)
        path = next((path for path in paths if path.is_file()), None)
        return path and read_names(path, False)
    if not isinstance(classes, (str, os.PathLike)) and len(classes) == 1:  # as the command line gives a file
        path = Path(os.path.expanduser(classes[0]))
        classes = path if path.is_file() or extension(path) in ENDINGS else classes
    if isinstance(classes, (str, os.PathLike)):
        path = Path(os.path.expanduser(classes))
        if not path.is_file():
            raise InputError(f'classes={os.fspath(classes)!r} is no file; give a file of names, or a list of names.')
        return read_names(path, True)
    if not classes:
        raise InputError('classes names none; give a list of names, a file of them, or leave it out.')
    positions(classes, 'classes')
    return Names(dict(enumerate(map(as_name, classes))), 'classes', True, counted=True)


def read_names(path: Path, chosen: bool) -> Names:
    """The names in a file, see :func:`read_class_names`, and their colours; numbers may have gaps.

    Colours: rows of a name and three numbers, in any order (``class_dict.csv``, ``labelmap.txt`` of CVAT,
    ``label_colors.txt``), or in JSON ``{"name": ..., "color": [R, G, B]}`` or ``{name: [R, G, B]}``.
    """
    text = read_text(path)
    with readable(path):
        table = json_table(json.loads(text)) if extension(path) == '.json' else text_table(text)
    numbered = {number: as_name(name) for number, name in table[0].items()}
    if not numbered:
        raise InputError(f'{path} names no class; write one name a line.')
    positions(numbered.values(), str(path))
    return Names(numbered, str(path), chosen, *table[1:])


Table = tuple[dict[int, str], dict[int, list[int]], bool]  # names and colours by number, and whether they have none


def json_table(content: Any) -> Table:
    """A table in JSON; see :class:`Names`."""
    content = content.get('categories', content) if isinstance(content, dict) else content
    if isinstance(content, dict):
        entries = [dict(name=name, color=value) for name, value in content.items()]
        has_numbers = not all(as_colour(value) for value in content.values())
    else:
        entries = [each if isinstance(each, dict) else dict(name=each) for each in content]
        has_numbers = all('id' in each for each in entries)
    numbered = json_names(content) if has_numbers else {i: str(each['name']) for i, each in enumerate(entries)}
    given = {str(each['name']): as_colour(each.get('color', each.get('colour'))) for each in entries}
    return numbered, {i: given[name] for i, name in numbered.items() if given.get(name)}, not has_numbers


def text_table(text: str) -> Table:
    """A table in lines; see :class:`Names`."""
    colours = text_colours(text)
    numbered = dict(enumerate(colours)) if colours else text_names(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return numbered, dict(enumerate(colours.values())), bool(colours) or list(numbered.values()) == lines


def as_colour(value: Any) -> list[int] | None:
    """A colour [R, G, B] from three numbers or ``#rrggbb``; None if it is none."""
    if isinstance(value, str) and re.fullmatch('#[0-9a-fA-F]{6}', value):
        return list(bytes.fromhex(value[1:]))
    is_one = isinstance(value, list) and len(value) >= 3 and all(type(v) is int and 0 <= v <= 255 for v in value[:3])
    return value[:3] if is_one else None


def text_colours(text: str) -> dict[str, list[int]]:
    """Name -> [R, G, B] from lines; {} if a line has no colour."""
    colours = {}
    for line in filter(None, (line.split('#')[0].strip() for line in text.splitlines())):
        numbers = re.search(r'(?<!\d)(\d{1,3})\s*[,;\s]\s*(\d{1,3})\s*[,;\s]\s*(\d{1,3})(?!\d)', line)
        colour = numbers and as_colour(list(map(int, numbers.groups())))
        name = (line[: numbers.start()] + line[numbers.end() :]).strip(' \t,;:') if colour else ''
        if colour and name:
            colours[name] = colour
        elif not re.fullmatch(r'name\W+r\W+g\W+b', line.casefold()):  # the head of class_dict.csv
            return {}
    return colours


def order_of(found: list[str], given: Names | None, where: str, notes: list[str]) -> list[str]:
    """The names that data have in the order in which names were given; as they are where none fit.

    Args:
        found: The names that the data have.
        given: The names that were given, or lie beside the data.
        where: What has ``found``, for messages.
        notes: Gets a line if ``given`` is not used.

    Raises:
        InputError: a file beside the data names some of the classes, but not all.
    """
    if given is None:
        return found
    if set(found) <= set(given.names) or given.chosen:
        return given.names
    if set(found) & set(given.names):
        extra = sorted(set(found).difference(given.names))
        raise InputError(
            f'{given.where} lacks {len(extra)} of the {len(found)} classes of {where}: {listed(extra)}; add them '
            'there, or remove that file.'
        )
    notes.append(f'{given.where} names none of the classes of {where} ({listed(found)}) and is not used.')
    return found
