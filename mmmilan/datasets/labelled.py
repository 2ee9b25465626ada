"""A folder of labelled images as people have it: its task, its classes by name, and who is in train and in val."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmmilan.datasets.classes import Names, as_name, match_names, names_of, order_of
from mmmilan.datasets.image_folder import expand_shards
from mmmilan.datasets.labelled_maps import Pairs, find_maps, read_maps
from mmmilan.datasets.labelled_objects import Coco, find_objects, read_objects
from mmmilan.datasets.listing import (
    IMAGE_FOLDERS,
    LABELS,
    Listing,
    list_annotated,
    list_folder,
    list_pictures,
    listed_once,
)
from mmmilan.datasets.object_formats import Part
from mmmilan.datasets.packed import refuse_archive
from mmmilan.datasets.splits import Splits, choose_parts, look_into, splits_of
from mmmilan.errors import InputError, count, listed
from mmmilan.files import extension

TASKS = ('classification', 'detection', 'segmentation')
SPLITS = ('train', 'val')
VAL_FRACTION = 0.2  # of each class, where the data have no split to validate on


Present = dict[str, set[int]]  # image -> labels in it


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
        source: What was read: the folder, or a file in it.
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
    source: str = ''
    table: list[tuple[int | list[int], int]] | None = None
    seed: int | None = None


def read_labelled(
    data: str | os.PathLike,
    task: str | None = None,
    classes: Sequence[str] | str | os.PathLike | None = None,
    ignore: str | int | Sequence[str | int] | None = None,
    seed: int = 0,
    evaluate: bool = False,
) -> Labelled:
    """Find out what a folder of labelled images holds, check it, and divide it where it is not divided.

    Args:
        data: Folders of classes, annotated objects, or images with label maps; divided (``train/``, ``val/``) or not.
        task: One of ``TASKS``; by default the one that the data have.
        classes: Names of the classes, or a file of them; by default ``classes.txt`` or ``classes.json`` of the folder,
            or what the annotations name, or else the folders.
        ignore: Classes whose images, objects or pixels are left out.
        seed: Of the division, which keeps a fifth of each class to validate on.
        evaluate: Whether a model is only evaluated on the data. Then ``val`` has all images; of a folder that is
            divided, those of ``val`` or else ``test``, and no other is read.

    Raises:
        InputError: the folder is none of the formats, its task is not clear, or its labels are wrong.
    """
    root = Path(os.path.expanduser(os.fspath(data))).absolute()
    if not root.exists():
        raise InputError(f'{data} does not exist; give a folder of labelled images.')
    refuse_archive(root)
    if task not in (None, *TASKS):
        raise InputError(f'task={task!r} is unknown; choose {", ".join(TASKS)}.')
    ignored = [ignore] if isinstance(ignore, (str, int)) else list(ignore or ())
    with listed_once():
        readers = find_tasks(root, task)
        read = readers.get(choose_task(root, readers, task), read_class_folders)
        labelled, present = read(root, classes, ignored, evaluate)
    if labelled.task == 'classification':
        check_several(labelled, 1 if evaluate else 2)
    check_labels(labelled, present, dict(test='train') if evaluate else dict(train='train', val='val'))
    if evaluate:
        labelled = labelled._replace(train=select(labelled.train, []), val=labelled.train)
    elif not image_paths(labelled.val):
        labelled = divided(labelled, present, seed)
    splits = dict(test='val') if evaluate else dict(train='train', val='val')
    return labelled._replace(source=str(root), notes=labelled.notes + absent_classes(labelled, present, splits))


def check_labels(labelled: Labelled, present: Present, splits: Mapping[str, str]) -> None:
    """Raise an :class:`InputError` for a split of images without a label; ``splits`` are called by their keys."""
    for name, split in splits.items():
        paths = image_paths(getattr(labelled, split))
        if paths and not any(present[path] for path in paths):
            reasons = [note.rstrip('.') for note in labelled.notes if note.startswith(f'{name}: ')]
            raise InputError(
                f'{labelled.root} has {count(len(paths), "image")} of {name} without a label of '
                f'{listed(labelled.classes)}{f" ({reasons[0]})" if reasons else ""}; label some, or remove them.'
            )


def absent_classes(labelled: Labelled, present: Present, splits: Mapping[str, str]) -> list[str]:
    """A line about the classes that a split has no image of; ``splits`` are called by their keys."""
    lines = []
    for name, split in splits.items():
        found = set().union(*(present[path] for path in image_paths(getattr(labelled, split))))
        names = [each for label, each in enumerate(labelled.classes) if label not in found]
        what = 'cannot be learnt' if name == 'train' else 'cannot be measured'
        lines += [f'Classes that {what}, without images in {name}: {listed(names)}.'] * bool(names)
    return lines


# -- the task


def find_tasks(root: Path, task: str | None) -> dict[str, Callable[..., tuple[Labelled, Present]]]:
    """The tasks, or the one that is asked for, for which a folder has labels, each with what reads the data set."""
    readers: dict[str, Callable[..., tuple[Labelled, Present]]] = {}
    if task in (None, 'detection') and (formats := find_objects(root)):
        readers['detection'] = partial(read_annotations, formats)
    if task in (None, 'segmentation') and (pairs := find_maps(root)):
        readers['segmentation'] = partial(read_label_maps, pairs)
    if root.is_dir() and has_class_folders(root, bool(readers)):
        readers['classification'] = read_class_folders
    return readers


def has_class_folders(root: Path, annotated: bool) -> bool:
    """Whether the folders of images look like classes: several, with hardly an image beside them.

    Folders within one of images, beside annotations, are something else, such as cities or cameras.
    """
    folder = look_into(root)
    if folder.splits:
        folder = look_into(os.path.join(folder.root, (folder.splits.train or folder.splits.held_out)[0]))
    inside = os.path.relpath(folder.root, root).split('/')
    return len(folder.counts) > max(1, folder.loose) and not (annotated and any(map(IMAGE_FOLDERS.fullmatch, inside)))


def choose_task(root: Path, found: Mapping[str, Any], task: str | None) -> str:
    """The task that is asked for, or the only one.

    Raises:
        InputError: the folder does not have it, or has several or none.
    """
    if task is None and len(found) == 1:
        return next(iter(found))
    if task == 'classification' and root.is_dir() and list_folder(root).files:
        return task  # which says what is wrong with the folders
    if task in found:
        return task
    if task is None and found:
        raise InputError(f'{root} has labels for {" and ".join(found)}; choose with task={next(iter(found))!r}.')
    raise InputError(
        f'{root} has no labels{f" for {task}" * bool(task)} ({what_is_in(root)}); give folders of classes, annotations '
        "of objects (COCO's JSON, YOLO's data.yaml, Pascal VOC's XML), or label maps in a folder masks beside images."
    )


def what_is_in(root: Path) -> str:
    """What a folder holds, for an error."""
    if root.is_file():
        return 'a file without annotations of objects'
    files = list_annotated(root).files
    images = list_folder(root).files
    folders = sorted({os.path.dirname(file) or '.' for file in images})
    kinds = Counter(extension(file) for file in files if extension(file) in LABELS)
    others = ''.join(f', {number} {kind}' for kind, number in sorted(kinds.items()))
    return f'found: {count(len(images), "image")}{f" in {listed(folders)}" * bool(folders)}{others}'


# -- objects and label maps


def read_annotations(
    formats: dict[str, Callable[[Names | None], list[Part]]],
    root: Path,
    classes: Any,
    ignored: Sequence[str | int],
    evaluate: bool,
) -> tuple[Labelled, Present]:
    """A data set of annotated objects, and the labels in each image."""
    if len(formats) > 1:
        raise InputError(
            f'{root} has annotations of objects in {len(formats)} formats, {" and ".join(formats)}; give the file '
            'data.yaml or the JSON in place of the folder, or remove the others.'
        )
    folder = root if root.is_dir() else root.parent
    given = names_of([folder], classes)
    parts = next(iter(formats.values()))(given)
    names, train, val, has_masks, notes = read_objects(parts, given, ignored, evaluate)
    present: Present = {}
    for split in (train, val):
        own = {image['id']: present.setdefault(image['file_name'], set()) for image in split['images']}
        for each in split['annotations']:
            own[each['image_id']].update([each['category_id'] - 1] * (not each['iscrowd']))
    return Labelled('detection', tuple(names), train, val, has_masks, notes, str(folder)), present


def read_label_maps(
    pairs: Pairs, root: Path, classes: Any, ignored: Sequence[str | int], evaluate: bool
) -> tuple[Labelled, Present]:
    """A data set of images with label maps, and the labels in each image."""
    names, train, val, present, table, notes = read_maps(root, pairs, classes, ignored, evaluate)
    return Labelled('segmentation', tuple(names), train, val, False, notes, str(root), table=table), present


# -- classification


def read_class_folders(
    root: Path, classes: Any, ignored: Sequence[str | int], evaluate: bool
) -> tuple[Labelled, Present]:
    """A data set whose folders are named after its classes, and the label of each image."""
    given = names_of([root], classes)
    splits = splits_of(root) or Splits([str(root)], [], [])
    train_roots, val_roots = choose_parts(dict(train=splits.train, val=splits.held_out[:1]), evaluate)
    unused = [folder for part in splits for folder in part if folder not in (*train_roots, *val_roots)]
    notes = [f'Not used: {listed(unused)}.'] * bool(unused)
    names_file = given and os.path.abspath(given.where)
    kinds = Counter(extension(file) for file in list_annotated(root).files if str(root / file) != names_file)
    if others := [f'{number} {kind}' for kind, number in sorted(kinds.items()) if kind in LABELS]:
        notes.append(f'The folders name the classes; not read: {listed(others)}.')
    pairs = find_maps(root)
    train, val = (gather(roots, pairs.maps if pairs else set(), notes) for roots in (train_roots, val_roots))
    for name in map(as_name, ignored):
        if name not in train and name not in val:
            raise InputError(f'ignore names {name}, which is no class of {root} ({listed(train)}); correct it.')
        left_out = len(train.pop(name, [])) + len(val.pop(name, []))
        notes.append(f'{count(left_out, "image")} of the class {name} left out, as ignore says.')
    where = ', '.join(map(str, train_roots))
    names = order_of(sorted(train), given, where, notes)
    for images, place in ((train, where), (val, ', '.join(map(str, val_roots)))):
        amounts = Counter({number: len(paths) for number, paths in enumerate(images.values())})
        if not set(images) <= set(names):
            match_names(list(images), names, place, given.where if given else where, lambda amounts=amounts: amounts)
    records = [
        [dict(img_path=path, label=label) for label, name in enumerate(names) for path in images.get(name, [])]
        for images in (train, val)
    ]
    labelled = Labelled('classification', tuple(names), *records, False, notes, str(root))
    return labelled, {record['img_path']: {record['label']} for part in records for record in part}


def check_several(labelled: Labelled, least: int) -> None:
    """Raise an :class:`InputError` for images of fewer classes than there must be to train or to evaluate on."""
    kinds = sorted({labelled.classes[record['label']] for record in labelled.train})
    if len(kinds) < least:
        raise InputError(
            f'{labelled.root} has images of {f"the class {kinds[0]} alone" if kinds else "no class"}: there is nothing '
            'to tell apart; give each class a folder of its own.'
        )


def gather(roots: Iterable[str | Path], maps: set[str], notes: list[str]) -> dict[str, list[str]]:
    """Class -> paths of its images, of some folders; a class of a folder without images has none."""
    images: dict[str, list[str]] = {}
    for root in roots:
        folder = look_into(root)
        base = folder.root if len(folder.counts) > 1 else os.path.abspath(root)
        listing = list_pictures(base, classes=True)
        files = [file for file in listing.files if '/' in file]
        if loose := len(listing.files) - len(files):
            notes.append(f'{count(loose, "image")} of {base} left out, in the folder of no class.')
        paths, file_of = expand_shards(base, files)
        found = [(path, files[i]) for path, i in zip(paths, file_of, strict=True)]
        kept = [(path, file) for path, file in found if path not in maps]
        if len(kept) < len(found):
            notes.append(f'{count(len(found) - len(kept), "label map")} of {base} left out.')
        for path, file in kept:
            images.setdefault(as_name(file.partition('/')[0]), []).append(path)
        for name in listing.top_folders:
            images.setdefault(as_name(name), [])
        notes += same_folders(listing)
    return images


def same_folders(listing: Listing) -> list[str]:
    """A line if all folders have several folders of the same names in them, which then may be the classes: of folds."""
    inner: dict[str, set[str]] = {name: set() for name in listing.top_folders}
    for folder, _, rest in (path.partition('/') for path in listing.folders):
        inner[folder].add(rest.partition('/')[0])
    same = sorted(set.intersection(*inner.values()) - {''}) if len(inner) > 1 else []
    return [
        f'Each of {listed(inner)} has the folders {listed(same)}; if those are the classes, give one of the former.'
    ] * (len(same) > 1)


# -- the split


def divided(labelled: Labelled, present: Present, seed: int) -> Labelled:
    """The data set with a part of its training images moved to ``val``, stratified by class.

    Args:
        labelled: The data set.
        present: The labels in each image.
        seed: Of the draw.
    """
    paths = image_paths(labelled.train)
    keys = [relative(path, labelled.root) for path in paths]
    held_out = {paths[i] for i in stratify(keys, [present.get(path, set()) for path in paths], VAL_FRACTION, seed)}
    if not any(present.get(path) for path in held_out):
        raise InputError(
            f'No class of {labelled.root} has two images, so none can be kept to validate on; give more images, or a '
            'folder val beside train.'
        )
    note = (
        f'No images to validate on: {len(held_out)} of {len(paths)} are kept for it, drawn by class with seed {seed}.'
    )
    train, val = (
        select(labelled.train, [path for path in paths if (path in held_out) == each]) for each in (False, True)
    )
    return labelled._replace(train=train, val=val, notes=[*labelled.notes, note], seed=seed)


def image_paths(part: list[dict] | Coco) -> list[str]:
    """The paths of the images of a split."""
    return (
        [each['file_name'] for each in part['images']]
        if isinstance(part, dict)
        else [each['img_path'] for each in part]
    )


def select(part: list[dict] | Coco, paths: Sequence[str]) -> list[dict] | Coco:
    """The images of a split that have these paths, in their order; objects get new ids."""
    place = {path: i for i, path in enumerate(paths)}
    if not isinstance(part, dict):
        return sorted((each for each in part if each['img_path'] in place), key=lambda each: place[each['img_path']])
    new = {image['id']: place[image['file_name']] for image in part['images'] if image['file_name'] in place}
    images = [image | dict(id=new[image['id']]) for image in part['images'] if image['id'] in new]
    annotations = [
        each | dict(image_id=new[each['image_id']]) for each in part['annotations'] if each['image_id'] in new
    ]
    annotations.sort(key=lambda each: each['image_id'])
    return part | dict(
        images=sorted(images, key=lambda image: image['id']),
        annotations=[each | dict(id=number) for number, each in enumerate(annotations, 1)],
    )


def stratify(keys: Sequence[str], labels: Sequence[set[int]], fraction: float, seed: int) -> set[int]:
    """Choose a part of some images in which each label has its share (Sechidis et al. 2011, iterative stratification).

    From the rarest label on, its images go where more of it is lacking. A label of two images or more is
    on both sides where other labels allow it. None is in the chosen part alone, unless half of what is wanted cannot be
    had so, as where each image has an object that no other one has.

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
    images: dict[int, list[int]] = {label: [] for label in total}
    for i, each in waiting.items():
        for label in each:
            images[label].append(i)
    for label in sorted(total, key=lambda label: (total[label], label)):
        own = [i for i in images[label] if i in waiting] if wanted[label] else []
        own.sort(key=lambda i: sum(1 if got[each] >= wanted[each] else -0.1 for each in waiting[i]))
        for i in own:
            keeps = all(
                got[each] < total[each] - 1 for each in waiting[i] if each >= 0
            )  # one of each label to train on
            if got[label] < wanted[label] and keeps:
                chosen.add(i)
                got.update(waiting[i])
            del waiting[i]
    fewest = round(fraction * len(keys) / 2) or 1
    if len(chosen) < fewest < len(keys) and any(len(each) > 1 for each in labels):
        lost = {i: sum(total[label] - got[label] < 2 for label in labels[i]) for i in order if i not in chosen}
        chosen.update(sorted(lost, key=lost.get)[: fewest - len(chosen)])
    return chosen


def relative(path: str, root: str) -> str:
    """A path from the folder of the data; one into a tar shard is kept as it is."""
    return path if '://' in path else os.path.relpath(path, root)
