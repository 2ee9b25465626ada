"""What the names of folders mean: training and evaluation, classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from mmmilan.datasets.image_folder import Source, as_sources, expand_shards, first_folder_of, images_in, list_images
from mmmilan.datasets.listing import ANNOTATION_FOLDERS, folders_of, list_folder, list_pictures, listed_once, remember
from mmmilan.datasets.packed import load_index
from mmmilan.errors import InputError, count, listed
from mmmilan.files import extension

TRAIN = {'train', 'training', 'trainval', 'trn', 'unlabel', 'unlabeled', 'unlabelled'}
VAL = {'val', 'valid', 'validation', 'minival', 'dev', 'eval', 'evaluation', 'holdout'}
TEST = {'test', 'testing', 'tst'}
# Words and numbers that stand beside those, as in val2017, train_images, Test-Set and mini_val.
BESIDE = re.compile(r'\d+|set|splits?|data|images?|imgs?|photos|pictures|mini|full')
# Of trainset, the first part is a word of its own.
WORD = re.compile(r'(?i:train|valid|val|test)(?=(?i:set|data|images?|imgs?)(?![a-z]))|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+')

Part = TypeVar('Part')


class Splits(NamedTuple):
    """The folders of a data set that is divided.

    Attributes:
        train: Those to train on.
        held_out: Those to evaluate on, ``val`` before ``test``.
        unused: The other ones.
    """

    train: list[str]
    held_out: list[str]
    unused: list[str]


def role_of(name: str) -> tuple[str, str] | None:
    """'train', 'val' or 'test', and the rest of a folder's name; None if the name is of no split.

    In any case and with what usually stands beside: ``Train``, ``val2017``, ``ILSVRC2012_img_val``. What remains tells
    ``cats_train`` and ``dogs_test`` apart.
    """
    roles, rest = [], []
    for word in map(str.lower, WORD.findall(name)):
        role = 'train' if word in TRAIN else 'val' if word in VAL else 'test' if word in TEST else ''
        if role:
            roles.append(role)
        elif not BESIDE.fullmatch(word):
            rest.append(word)
    return (roles[0], ' '.join(rest)) if roles else None


def divide(names: Sequence[str], alone: bool) -> Splits | None:
    """Which of the folders beside each other are splits; None if they are something else, such as classes.

    A split for training and one for evaluation make splits, whatever lies beside. Other names of splits count only if
    nothing else lies beside: a class may be called ``train``.

    Args:
        names: The folders that hold images.
        alone: Whether no image lies beside them.
    """
    roles = {name: role for name in names if (role := role_of(name))}
    kinds: dict[str, set[bool]] = {}
    for role, rest in roles.values():
        kinds.setdefault(rest, set()).add(role == 'train')
    pairs = {rest for rest, found in kinds.items() if len(found) == 2}
    pairs = {''} if '' in pairs else pairs
    if not pairs:
        if not alone or not roles or len(roles) < len(names) or set(kinds) != {''}:
            return None
        pairs = {''}
    chosen = {name: role for name, (role, rest) in roles.items() if rest in pairs}
    held_out = [name for kind in ('val', 'test') for name in sorted(chosen) if chosen[name] == kind]
    train = [name for name in sorted(chosen) if chosen[name] == 'train']
    if not train and len(held_out) > 1:
        train, held_out = held_out[:1], [held_out[-1], *held_out[1:-1]]
    return Splits(train, held_out, sorted(set(names).difference(chosen)))


def choose_parts(parts: Mapping[str, list[Part]], evaluate: bool) -> tuple[list[Part], list[Part]]:
    """What to train and what to validate on, of the parts of a labelled data set.

    Without a part to train on, ``val`` or else ``test`` takes its place. For a model that is only evaluated, what it
    would be validated on takes that place, so that no other part is read.

    Args:
        parts: By role: 'train', 'val', 'test', or '' of what is not divided.
        evaluate: Whether a model is only evaluated.
    """
    train = next((own for role in ('train', '', 'val', 'test') if (own := parts.get(role))), [])
    val = next((own for role in ('val', 'test') if (own := parts.get(role)) and own is not train), [])
    return (val or train, []) if evaluate else (train, val)


class Folder(NamedTuple):
    """A folder of images, seen from where its images divide.

    Attributes:
        root: The folder, or the one within it that holds all the images.
        counts: Number of images and shards in each folder directly in it.
        loose: Number of those directly in it.
        splits: Its splits, if it has any.
        unclear: If it has none, and seems to be divided in another way, how, in a sentence; else ''.
    """

    root: str
    counts: dict[str, int]
    loose: int
    splits: Splits | None
    unclear: str


def look_into(source: Source) -> Folder:
    """Go down into a folder until images or several folders with images lie there, or splits."""
    root = os.path.expanduser(os.fspath(source))
    return remember(('look into', root), lambda: _look_into(root))


def _look_into(root: str) -> Folder:
    files = list_pictures(root, quiet=True).files if os.path.isdir(root) else []
    if extension(root) == '.tar' and os.path.isfile(root):
        return Folder(root, {}, 1, None, divided_shards('', [root]))
    while True:
        counts = Counter(file.partition('/')[0] for file in files if '/' in file)
        loose = len(files) - counts.total()
        splits = divide(sorted(counts), not loose)
        if splits is not None or loose or len(counts) != 1:
            divided = '' if splits else unclear(root, files)
            return Folder(root, dict(sorted(counts.items())), loose, splits, divided)
        inner = next(iter(counts))
        root = os.path.join(root, inner)
        files = [file.partition('/')[2] for file in files if file.startswith(f'{inner}/')]


def unclear(root: str, files: Sequence[str]) -> str:
    """How the files of a folder without splits seem to be divided, in a sentence; '' if they do not."""
    if inner := splits_within(folders_of(files)):
        train, held_out = inner
        outer, name = os.path.split(train)
        return (
            f'{root} is divided within its folders, such as into {train} and {held_out}; put the splits above '
            f'them, as in {name}/{outer}, or pretrain on several folders, such as {os.path.join(root, outer)}.'
        )
    return unnamed_splits(root, files) or divided_shards(root, [file for file in files if extension(file) == '.tar'])


def splits_within(folders: Iterable[str]) -> tuple[str, str] | None:
    """Two folders, of some and those above them, that are splits: one to train and one to evaluate on.

    They lie beside each other, or at one depth in several folders, such as ``ant/train`` and ``bee/val``.
    """
    within: dict[str, set[str]] = {}
    depths: dict[int, dict[str, str]] = {}
    for folder in set(folders):
        while folder:
            whole, (folder, _, name) = folder, folder.rpartition('/')
            within.setdefault(folder, set()).add(name)
            if role_of(name) and folder:
                depths.setdefault(folder.count('/'), {}).setdefault(name, whole)
    for folder in sorted(within, key=lambda name: (bool(ANNOTATION_FOLDERS.fullmatch(name.partition('/')[0])), name)):
        if splits := divide(sorted(within[folder]), alone=False):
            inner = splits.train[0], splits.held_out[0]
            return (f'{folder}/{inner[0]}', f'{folder}/{inner[1]}') if folder else inner
    for depth in sorted(depths):
        if splits := divide(sorted(depths[depth]), alone=False):
            return depths[depth][splits.train[0]], depths[depth][splits.held_out[0]]
    return None


def unnamed_splits(root: str, files: Sequence[str]) -> str:
    """As :func:`unclear`: a split beside folders of other names with the same folders in them, such as of classes."""
    inner: dict[str, set[str]] = {}
    for first, _, rest in (file.partition('/') for file in files):
        if '/' in rest:
            inner.setdefault(first, set()).add(rest.partition('/')[0])
    for name, folders in inner.items():
        role = role_of(name)
        alike = [other for other in inner if len(inner[other] & folders) > 1 and not role_of(other)]
        if role and not role[1] and alike:
            return (
                f'{root} has {name} beside {listed(alike)}, with folders of the same names in them '
                f'({listed(sorted(folders & inner[alike[0]]))}); call splits train, val and test, or give the folders '
                'to use one by one.'
            )
    return ''


def divided_shards(root: str, shards: Sequence[str]) -> str:
    """As :func:`unclear`: tar shards with names of splits, or with folders of such names in them."""
    if splits := divide([shard[: -len('.tar')] for shard in shards], alone=False):
        train, held_out = splits.train[0], splits.held_out[0]
        return (
            f'{root} holds {train}.tar beside {held_out}.tar; put the shards of each split into a folder of its own '
            '(train, val), or give those to use one by one.'
        )
    for shard in shards:
        path = os.path.join(root, shard)
        start = len(f'tar://{path}/')
        index = remember(path, partial(load_index, Path(path)))
        if inner := splits_within(folders_of(image[start:].removeprefix('./') for image, _ in index.samples)):
            return f'{path} is divided into {inner[0]} and {inner[1]}; unpack it, or make a tar of each split.'
    return ''


def splits_of(source: Source) -> Splits | None:
    """The folders of a data set with splits, such as ``train`` and ``val``; None for any other source.

    Raises:
        InputError: it is divided in another way, such as within the folders of classes or within a tar.
    """
    folder = look_into(source)
    if sentence := folder.unclear:
        raise InputError(sentence)
    return folder.splits and Splits(*([os.path.join(folder.root, name) for name in part] for part in folder.splits))


def training_sources(sources: Source | Sequence[Source]) -> list[Source]:
    """What to train on: the training splits of each source, or its only split, or the source itself.

    Raises:
        InputError: as :func:`splits_of`.
    """
    chosen: list[Source] = []
    for source in as_sources(sources):
        splits = splits_of(source)
        chosen += (splits.train or splits.held_out[:1]) if splits else [source]
    return chosen


def evaluation_source(source: Source) -> Source:
    """What to evaluate on: the split ``val`` of a source, or else ``test``, or the source itself without splits."""
    splits = splits_of(source)
    return (splits.held_out or splits.train)[0] if splits else source


def class_folders(source: Source) -> tuple[Source, list[str]]:
    """The folder whose folders name classes, and their names: two or more, no image beside them, and no splits.

    The folder is the source, or the one within it that holds all its images. A folder without images names a class,
    too, as for :class:`ImageFolder`. Without classes: the source and [].
    """
    folder = look_into(source)
    if len(folder.counts) < 2 or folder.loose or folder.splits:
        return source, []
    return folder.root, list_folder(folder.root).top_folders


def list_labelled_images(source: Source) -> tuple[Sequence[str], np.ndarray, list[str]]:
    """Paths of the images to evaluate on, their labels [M], int, and the class names of :func:`class_folders`.

    Without class folders all labels are 0 and there are no class names.

    Raises:
        InputError: the source does not exist, or holds no image; or as :func:`splits_of`.
    """
    with listed_once():
        source = evaluation_source(source)
        root, classes = class_folders(source)
        if not classes:
            images = images_in(source)
            return images, np.zeros(len(images), int), classes
        files = list_pictures(root, classes=True).files
        images, file_of = expand_shards(str(root), files)
    return images, first_folder_of(files, classes)[file_of], classes


def describe(sources: Sequence[Source]) -> str:
    """What was understood of the folders, for the log before a training."""
    training = training_sources(sources)
    parts = [f'{count(len(list_images(training)), "image")} to train on, from {listed(training)}']
    held_out = [evaluation_source(source) for source in sources]
    if set(map(os.fspath, held_out)) <= set(map(os.fspath, training)):
        parts.append('none are kept for evaluation, which uses the same images')
    else:
        parts.append(f'{len(list_images(held_out))} kept for evaluation, in {listed(held_out)}')
    for source in sources:
        splits = splits_of(source)
        unused = [folder for folder in (splits.unused if splits else []) if list_folder(folder).files]
        unused += splits.held_out[1:] if splits else []
        if unused:
            parts.append(f'not used: {listed(unused)}')
    among = [
        os.path.join(root, folder)
        for root in (look_into(source).root for source in training)
        for folder in sorted(folders_of(list_pictures(root).files) if os.path.isdir(root) else ())
        if any(map(ANNOTATION_FOLDERS.fullmatch, folder.split('/')))
    ]
    if among:
        parts.append(f'used as images, though named like annotations: {listed(among)}')
    _, classes = class_folders(held_out[0])
    if len(held_out) == 1 and classes:
        parts.append(f'classes of the evaluation, named by folders: {len(classes)} ({listed(classes)})')
    else:
        parts.append('no folders that name classes')
    return '; '.join(parts) + '.'
