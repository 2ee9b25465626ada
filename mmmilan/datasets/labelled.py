"""A folder of labelled images as people have it: its task, its classes by name, and who is in train and in val."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmmilan.datasets.classes import as_name, listed, match_names, positions, read_class_names
from mmmilan.datasets.image_folder import ImageFolder, expand_shards
from mmmilan.datasets.listing import is_leaving, list_folder, listed_once
from mmmilan.datasets.splits import look_into, splits_of
from mmmilan.errors import InputError, count
from mmmilan.files import first_line, write_text
from mmmilan.registry import DATASETS

TASKS = ('classification', 'detection', 'segmentation')
NAME_FILES = ('classes.txt', 'classes.json')


class Labelled(NamedTuple):
    """A labelled data set as it was understood.

    Attributes:
        task: One of ``TASKS``.
        classes: Names in the order of the labels.
        train: Records to train on. Classification: ``dict(img_path, label)``; segmentation:
            ``dict(img_path, map_path)``; detection: a dictionary in COCO's format with absolute file names, where
            category ``label + 1`` is ``classes[label]``. Paths are absolute.
        val: As ``train``, to validate on.
        has_masks: Detection: whether each object has a mask.
        notes: What was counted and is worth a line each.
        root: The folder of the data, absolute.
        table: Segmentation: pairs of a value, or of a colour [R, G, B], in the maps and its label, 255 to ignore; None
            if the values are the labels.
        seed: Of the split; None where the data are divided.
    """

    task: str
    classes: tuple[str, ...]
    train: Any
    val: Any
    has_masks: bool
    notes: list[str]
    root: str
    table: list[tuple[int | list[int], int]] | None = None
    seed: int | None = None


class Names(NamedTuple):
    """Names of classes that the user gave, or that lie beside the images.

    Attributes:
        names: The names.
        where: The option or file that has them.
        numbered: Number -> name, where the numbers stand there too.
        colours: Name -> [R, G, B], where colours stand there too.
        chosen: Whether the user gave them.
    """

    names: list[str]
    where: str
    chosen: bool
    numbered: dict[int, str] = {}
    colours: dict[str, list[int]] = {}


def read_labelled(
    data: str | os.PathLike,
    task: str | None = None,
    classes: Sequence[str] | str | os.PathLike | None = None,
    ignore: str | int | Sequence[str | int] | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Labelled:
    """Find out what a folder of labelled images holds, check it, and divide it where it is not divided.

    Args:
        data: Folders of classes, divided (``train/``, ``val/``) or not.
        task: One of ``TASKS``; by default the one that the data have.
        classes: Names of the classes, or a file of them; by default ``classes.txt`` or ``classes.json`` of the folder,
            or what the annotations name, or else the folders.
        ignore: Classes whose images, objects or pixels are left out.
        val_fraction: How much of each class is kept to validate on, where the data have no split for it.
        seed: Of that split.

    Raises:
        InputError: the folder is none of the formats, its task is not clear, or its labels are wrong.
    """
    root = Path(os.path.expanduser(os.fspath(data))).absolute()
    if not root.exists():
        raise InputError(f'{data} does not exist; give a folder of labelled images.')
    if task not in (None, *TASKS):
        raise InputError(f'task={task!r} is unknown; choose {", ".join(TASKS)}.')
    if not 0 < val_fraction < 1:
        raise InputError(f'val_fraction={val_fraction} is not between 0 and 1; give 0.2 to validate on a fifth.')
    ignored = [ignore] if isinstance(ignore, (str, int)) else list(ignore or ())
    with listed_once():
        labelled = read_class_folders(root, names_of(root, classes), ignored)
    return labelled if labelled.val else divided(labelled, val_fraction, seed)


# -- names


def names_of(root: Path, classes: Sequence[str] | str | os.PathLike | None) -> Names | None:
    """The names that were given, or those of a file in the folder; None without."""
    if classes is None:
        path = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
        return path and read_names(path, False)
    if isinstance(classes, (str, os.PathLike)):
        path = Path(os.path.expanduser(classes))
        if not path.is_file():
            raise InputError(f'classes={os.fspath(classes)!r} is no file; give a file of names, or a list of names.')
        return read_names(path, True)
    names = list(map(as_name, classes))
    positions(names, 'classes')
    return Names(names, 'classes', True)


def read_names(path: Path, chosen: bool) -> Names:
    """The names in a file, see :func:`mmmilan.datasets.classes.read_class_names`."""
    return Names(list(map(as_name, read_class_names(path))), str(path), chosen)


# -- classification


def read_class_folders(root: Path, given: Names | None, ignored: Sequence[str | int]) -> Labelled:
    """A data set whose folders are named after its classes."""
    splits = splits_of(root)
    train_roots, val_roots = (splits.train or [root], splits.held_out[:1]) if splits else ([root], [])
    notes: list[str] = []
    train, val = (gather(roots, notes) for roots in (train_roots, val_roots))
    for name in map(as_name, ignored):
        if name not in train and name not in val:
            raise InputError(f'ignore names {name}, which is no class of {root} ({listed(train)}); correct it.')
        left_out = len(train.pop(name, [])) + len(val.pop(name, []))
        notes.append(f'{count(left_out, "image")} of the class {name} left out, as ignore says.')
    where = ', '.join(map(str, train_roots))
    classes = order_of(sorted(train), given, where, notes)
    for images, place in ((train, where), (val, ', '.join(map(str, val_roots)))):
        amounts = Counter({number: len(paths) for number, paths in enumerate(images.values())})
        if not set(images) <= set(classes):
            match_names(list(images), classes, place, given.where if given else where, lambda amounts=amounts: amounts)
    if len(kinds := [name for name in classes if train.get(name)]) < 2:
        raise InputError(
            f'{where} has images of {f"the class {kinds[0]} alone" if kinds else "no class"}: there is nothing to '
            'tell apart; give each class a folder of its own.'
        )
    notes += absent(classes, {name: len(paths) for name, paths in train.items()}, 'train')
    if val:
        notes += absent(classes, {name: len(paths) for name, paths in val.items()}, 'val')
    records = [
        [dict(img_path=path, label=label) for label, name in enumerate(classes) for path in images.get(name, [])]
        for images in (train, val)
    ]
    return Labelled('classification', tuple(classes), *records, False, notes, str(root))


def gather(roots: Iterable[str | Path], notes: list[str]) -> dict[str, list[str]]:
    """Class -> paths of its images, of some folders; a class of a folder without images has none."""
    images: dict[str, list[str]] = {}
    for root in roots:
        folder = look_into(root)
        base = folder.root if len(folder.counts) > 1 else os.path.abspath(root)
        listing = list_folder(base)
        files = [file for file in listing.files if '/' in file]
        if loose := len(listing.files) - len(files):
            notes.append(f'{count(loose, "image")} of {base} left out, in the folder of no class.')
        for path, file in expand_shards(base, files):
            images.setdefault(as_name(file.partition('/')[0]), []).append(path)
        for entry in os.scandir(base):
            if entry.is_dir() and not is_leaving(entry.name):
                images.setdefault(as_name(entry.name), [])
    return images


def order_of(found: list[str], given: Names | None, where: str, notes: list[str]) -> list[str]:
    """The names of folders in the order in which names were given; sorted where none fit."""
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
    notes.append(f'{given.where} names none of the folders of {where} and is not used: the folders are the classes.')
    return found


def absent(classes: Sequence[str], counts: Mapping[str, int], split: str) -> list[str]:
    """A line about the classes that a split has no image of, or none."""
    names = [name for name in classes if not counts.get(name)]
    what = 'cannot be learnt' if split == 'train' else 'cannot be measured'
    return [f'Classes that {what}, without images in {split}: {listed(names)}.'] * bool(names)


# -- the split


def divided(labelled: Labelled, val_fraction: float, seed: int) -> Labelled:
    """The data set with a part of its training records moved to ``val``, stratified by class."""
    present = [{record['label']} for record in labelled.train]
    chosen = stratify(keys_of(labelled, 'train'), present, val_fraction, seed)
    if not chosen:
        raise InputError(
            f'No class of {labelled.root} has two images, so none can be kept to validate on; give more images, or a '
            'folder val beside train.'
        )
    seen = Counter(label for i in chosen for label in present[i])
    note = (
        f'No images to validate on: {len(chosen)} of {len(present)} are kept for it, drawn by class with seed {seed}.'
    )
    return labelled._replace(
        train=[record for i, record in enumerate(labelled.train) if i not in chosen],
        val=[record for i, record in enumerate(labelled.train) if i in chosen],
        notes=[
            *labelled.notes,
            note,
            *absent(labelled.classes, {name: seen[i] for i, name in enumerate(labelled.classes)}, 'val'),
        ],
        seed=seed,
    )


def keys_of(labelled: Labelled, split: str) -> list[str]:
    """The paths of the images of a split relative to the folder of the data."""
    return [os.path.relpath(record['img_path'], labelled.root) for record in getattr(labelled, split)]


def stratify(keys: Sequence[str], labels: Sequence[set[int]], fraction: float, seed: int) -> set[int]:
    """Choose a part of some images in which each label has its share (Sechidis et al. 2011, iterative stratification).

    From the rarest label on, its images go where more of it is lacking. A label of two images or more is on both sides.

    Args:
        keys: What the images are called; their order does not matter.
        labels: Labels in each image; none in a negative.
        fraction: Share of the part.
        seed: Of the draw.

    Returns:
        Places of the chosen images.
    """
    order = np.random.default_rng(seed).permutation(sorted(range(len(keys)), key=keys.__getitem__)).tolist()
    waiting = {i: labels[i] or {-1} for i in order}
    total = Counter(label for each in waiting.values() for label in each)
    wanted = {
        label: min(max(1, round(fraction * number)), number - 1) if label >= 0 else round(fraction * number)
        for label, number in total.items()
    }
    chosen: set[int] = set()
    got: Counter[int] = Counter()
    for label in sorted(total, key=lambda label: (total[label], label)):
        own = [i for i in waiting if label in waiting[i]]
        # first those whose other labels lack images too
        own.sort(key=lambda i: sum(got[each] >= wanted[each] for each in waiting[i]))
        for i in own:
            take = got[label] < wanted[label]
            if take:
                chosen.add(i)
                got.update(waiting[i])
            del waiting[i]
    return chosen


# -- what a run reads


def write_labelled(labelled: Labelled, folder: str | os.PathLike) -> dict[str, dict]:
    """Write ``split.json`` into a folder, or take the division of the one that is there.

    Returns:
        Configs of data sets without pipelines, 'train' and 'val'.

    Raises:
        InputError: ``split.json`` is of other data, or images of it are gone.
    """
    path = Path(folder) / 'split.json'
    if path.exists():
        labelled = divided_as(labelled, read_split(path), path)
    content = dict(data=labelled.root, task=labelled.task, classes=labelled.classes, seed=labelled.seed)
    for split in ('train', 'val'):
        labels = [record['label'] for record in getattr(labelled, split)]
        content[split] = list(zip(keys_of(labelled, split), labels, strict=True))
    write_text(path, json.dumps(content, indent=0) + '\n')
    common = dict(type='mmmilan.LabelledImages', ann_file=str(path.absolute()), metainfo=dict(classes=labelled.classes))
    return dict(train=common | dict(split='train'), val=common | dict(split='val', test_mode=True))


def divided_as(labelled: Labelled, content: dict[str, Any], path: Path) -> Labelled:
    """The data set with its records divided as a ``split.json`` says.

    Raises:
        InputError: that file is of another task, of other classes or of other images.
    """
    remedy = 'give another folder for the output, or remove that file to divide the data again'
    for key, value in (('task', labelled.task), ('classes', list(labelled.classes))):
        if content[key] != value:
            raise InputError(f'{path} was written for other data (its {key}: {content[key]}, now {value}); {remedy}.')
    records = {
        key: record
        for split in ('train', 'val')
        for key, record in zip(keys_of(labelled, split), getattr(labelled, split), strict=True)
    }
    names = [[entry[0] for entry in content[split]] for split in ('train', 'val')]
    gone = [name for part in names for name in part if name not in records]
    new = set(records).difference(*names)
    if gone or new:
        raise InputError(
            f'{path} does not fit the images of {labelled.root}: {count(len(gone), "image")} of it are gone and '
            f'{len(new)} are new ({listed([*gone, *sorted(new)])}); {remedy}.'
        )
    train, val = ([records[name] for name in part] for part in names)
    return labelled._replace(train=train, val=val, seed=content['seed'])


@DATASETS.register_module()
class LabelledImages(ImageFolder):
    """The images of a ``split.json`` that :func:`write_labelled` wrote, with their labels or label maps.

    Args:
        ann_file: The file.
        split: 'train' or 'val'.
        data_root: The folder of the data, if it is no longer where the file says.
        kwargs: Other arguments of :class:`ImageFolder`, except ``with_label``.
    """

    def __init__(self, ann_file: str, split: str, data_root: str = '', **kwargs) -> None:
        self.split, self.moved_to = split, data_root
        super().__init__(data_root='', with_label=True, ann_file=ann_file, **kwargs)

    def load_data_list(self) -> list[dict]:
        content = read_split(Path(self.ann_file))
        root = self.moved_to or content['data']
        self._metainfo.setdefault('classes', tuple(content['classes']))
        return [dict(img_path=os.path.join(root, file), gt_label=label) for file, label in content[self.split]]


def read_split(path: Path) -> dict[str, Any]:
    """What a ``split.json`` says.

    Raises:
        InputError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not all(key in content for key in ('data', 'task', 'classes', 'train', 'val')):
            raise ValueError('it is not one that finetune wrote')
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f'{path} cannot be read as a split ({first_line(error)}); remove it to divide the data again.'
        ) from error
    return content
