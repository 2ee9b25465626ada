"""Which files of a folder are images: the one walker, for every command and data set."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
from mmengine.logging import print_log

from mmmilan.datasets.decoding import EXTENSIONS, REMEDIES
from mmmilan.errors import listed, printable, warn
from mmmilan.files import extension

# What macOS, Synology, QNAP, Windows and Python leave in folders, in lower case.
LEAVINGS = {'__macosx', '@eadir', '@recycle', '#recycle', '$recycle.bin', 'system volume information', 'thumbs.db'}
LEAVINGS |= {'desktop.ini', '__pycache__', 'lost+found', 'recycler', '@tmp', '_gsdata_'}
IMAGE_FOLDERS = re.compile(r'images?|imgs?|img_dir|jpegimages|leftimg8bit|photos?|rgb', re.IGNORECASE)
ANNOTATION_FOLDERS = re.compile(
    r'annotations?|ann_dir|labels?|masks?|gt\w*|ground_?truths?|segmentation\w*|panoptic\w*|depths?', re.IGNORECASE
)
OWN = '.tar.index.json'  # beside a shard, see mmmilan.datasets.packed

IMAGES = (*EXTENSIONS, '.tar')
LABELS = ('.json', '.yaml', '.yml', '.xml', '.txt', '.csv')

# Within listed_once, of each thread its own: another one may list while a training runs.
_remembered: ContextVar[dict[Any, Any] | None] = ContextVar('remembered', default=None)


class Names(Sequence[str]):
    """File names in one array: a million of 40 letters take 50 MB and not 100, of which data workers copy nothing.

    Args:
        names: The names, none of which holds a zero byte.

    Attributes:
        content: All names, each followed by a zero byte.
        ends: Where each ends in ``content``, after its zero byte: [M], int64.
    """

    def __init__(self, names: Iterable[str] = (), *, content: bytes | None = None) -> None:
        if content is None:
            names = list(names)
            content = '\0'.join([*names, '']).encode('utf-8', 'surrogatepass')
        self.content = content
        self.ends = np.flatnonzero(np.frombuffer(content, np.uint8) == 0) + 1

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        """The names of several, one after the other."""
        return parts[0] if len(parts) == 1 else cls(content=b''.join(part.content for part in parts))

    def within(self, folder: str) -> Names:
        """The names with that of a folder before each."""
        before = os.path.join(folder, '').encode('utf-8', 'surrogatepass')
        return Names(content=before + self.content[:-1].replace(b'\0', b'\0' + before) + b'\0' if self.content else b'')

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        begin = self.ends[index - 1] if index else 0
        return decoded(self.content[begin : self.ends[index] - 1])

    def __iter__(self) -> Iterator[str]:
        return iter(decoded(self.content[:-1]).split('\0') if self.content else ())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


def decoded(name: bytes) -> str:
    """One name of :class:`Names`, or several."""
    return name.decode('utf-8', 'surrogatepass')


class Listing(NamedTuple):
    """What a folder holds.

    Attributes:
        files: Paths of the files of the wanted kinds, relative to the folder, sorted.
        folders: Paths of the folders in it, empty ones too, relative to it, sorted.
        left_out: Number of other files by kind.
    """

    files: Names
    folders: list[str]
    left_out: Mapping[str, int]

    @property
    def top_folders(self) -> list[str]:
        """Names of the folders directly in it."""
        return [folder for folder in self.folders if '/' not in folder]


@contextmanager
def listed_once() -> Iterator[None]:
    """Within this context a folder is listed once, and what is left out of it is said once.

    What comes into the folder meanwhile is not seen.
    """
    token = _remembered.set({} if _remembered.get() is None else _remembered.get())
    try:
        yield
    finally:
        _remembered.reset(token)


def remember(key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` returns; within :func:`listed_once` it is called once for each key."""
    remembered = _remembered.get()
    if remembered is None:
        return make()
    if key not in remembered:
        remembered[key] = make()
    return remembered[key]


def is_leaving(name: str) -> bool:
    """Whether a file or folder is hidden, a leaving of another tool, or a file that we leave."""
    return name.startswith(('.', '~$')) or name.lower() in LEAVINGS or name.lower().endswith(OWN)


def list_folder(folder: str | os.PathLike, kinds: tuple[str, ...] = IMAGES) -> Listing:
    """The files of some extensions in a folder, however nested; the others are counted in one line of the log.

    Hidden files and leavings of other tools are skipped. Links to folders are followed, except back to a folder on the
    way there. A folder that cannot be read is named in the log.

    Args:
        folder: The folder.
        kinds: Extensions in lower case; by default those of images and tar shards.
    """
    folder = os.path.normpath(os.fspath(folder))
    known = part_of_known(folder, kinds)
    return known or remember((folder, kinds), lambda: log_listing(folder, walk(folder, frozenset(kinds))))


def list_annotated(folder: str | os.PathLike) -> Listing:
    """As :func:`list_folder`, of images and of files that may hold their labels.

    Within :func:`listed_once` the folder then is listed for images alone, too, without a word on the files of labels.
    """
    listing = list_folder(folder, (*IMAGES, *LABELS))
    images = Names(file for file in listing.files if extension(file) in IMAGES)
    remember((os.path.normpath(os.fspath(folder)), IMAGES), lambda: Listing(images, listing.folders, listing.left_out))
    return listing


def list_pictures(folder: str | os.PathLike, classes: bool = False, quiet: bool = False) -> Listing:
    """As :func:`list_folder`, of images and tar shards without label maps and the like, which the log counts.

    Of a folder that is named itself, such as ``masks``, nothing is taken for a label map because of its own name.

    Args:
        folder: The folder.
        classes: Whether the folders directly in it are classes, whatever they are called.
        quiet: Whether the log says nothing, as the images are not read, or the label maps too.
    """
    folder = os.path.normpath(os.fspath(folder))
    listing, left_out = remember(
        (folder, 'pictures', classes), lambda: without_annotations(folder, list_folder(folder), classes)
    )
    log_left_out(folder, {} if quiet else left_out)
    return listing


def without_annotations(folder: str, listing: Listing, classes: bool) -> tuple[Listing, Mapping[str, int]]:
    """What :func:`list_pictures` gives of the listing of a folder, and how many label maps it leaves out."""
    if not any(ANNOTATION_FOLDERS.fullmatch(os.path.basename(each)) for each in listing.folders):
        return listing, {}  # without a look at each of perhaps millions of files
    maps = annotation_folders(folders_of(listing.files), classes)
    if not maps:
        return listing, {}
    files = Names(file for file in listing.files if not lies_in(file, maps))
    where = listed(sorted(each for each in maps if not lies_in(each.rpartition('/')[0], maps)))
    lost = len(listing.files) - len(files)
    folders = [each for each in listing.folders if not lies_in(each, maps)]
    return Listing(files, folders, listing.left_out), {f'in folders of label maps and the like ({where})': lost}


def annotation_folders(folders: Collection[str], classes: bool) -> set[str]:
    """Folders called as annotations are, beside a single other one that is called as images are.

    As ``VOC2012/SegmentationClass`` and ``VOC2012/SegmentationObject`` beside ``VOC2012/JPEGImages``, at any depth.

    Args:
        folders: Those that hold files themselves, '' for the one that holds all.
        classes: As for :func:`list_pictures`.
    """
    inner: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        while folder:
            folder, name = os.path.split(folder)
            inner[folder].add(name)
    found: set[str] = set()
    for folder, names in inner.items():
        others = {name for name in names if not IMAGE_FOLDERS.fullmatch(name)}
        is_pair = len(names) - len(others) == 1 and all(map(ANNOTATION_FOLDERS.fullmatch, others))
        if is_pair and folder not in folders and (folder or not classes):
            found.update(os.path.join(folder, name) for name in others)
    return found


def folders_of(files: Iterable[str]) -> set[str]:
    """The folders that hold some files."""
    return {file.rpartition('/')[0] for file in files}


def lies_in(path: str, folders: Collection[str]) -> bool:
    """Whether a path is one of some folders, or lies in one."""
    while path and path not in folders:
        path = path.rpartition('/')[0]
    return bool(path)


def part_of_known(folder: str, kinds: tuple[str, ...]) -> Listing | None:
    """The listing of a folder within another one that was listed before."""
    outer, inner = os.path.split(folder)
    remembered = _remembered.get()
    while remembered and inner and outer and not any(map(is_leaving, inner.split('/'))):
        if whole := remembered.get((outer, kinds)):
            prefix = f'{inner}/'
            files, folders = (
                [path[len(prefix) :] for path in paths if path.startswith(prefix)]
                for paths in (whole.files, whole.folders)
            )
            return Listing(Names(files), folders, {}) if files else None
        outer, name = os.path.split(outer)
        if not name:
            break
        inner = f'{name}/{inner}'
    return None


def walk(top: str, kinds: frozenset[str]) -> Listing:
    """As :func:`list_folder`, from the disk."""
    files: list[str] = []
    folders: list[str] = []
    left_out: Counter[str] = Counter()
    waiting: list[tuple[str, str, tuple]] = [(top, '', ())]
    while waiting:
        folder, prefix, parents = waiting.pop()
        here = identity(folder)
        if here in parents:
            continue
        for entry in entries_of(folder):
            name = entry.name
            if name[name.rfind('.') :].lower() in kinds and not is_leaving(name) and is_kind(entry.is_file):
                files.append(prefix + name)
            elif not is_kind(entry.is_dir):
                left_out[kind_of(entry)] += 1
            elif is_leaving(name):
                left_out['hidden folders'] += 1
            else:
                waiting.append((entry.path, f'{prefix}{name}/', (*parents, here)))
                folders.append(prefix + name)
    del left_out['']
    files.sort()
    return Listing(Names(files), sorted(folders), left_out)


def identity(folder: str) -> tuple[int, int] | None:
    """What tells a folder from all others; None if it cannot be read."""
    try:
        state = os.stat(folder)
    except OSError:
        return None
    return state.st_dev, state.st_ino


def entries_of(folder: str) -> Iterator[os.DirEntry]:
    """What lies in a folder, up to where it cannot be read, which the log says."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        warn(printable(f'Skipped: {folder} cannot be read ({error.strerror}).'))


def is_kind(test: Callable[[], bool]) -> bool:
    """Whether an entry is a file or a folder; False for a link to itself."""
    try:
        return test()
    except OSError:
        return False


def kind_of(entry: os.DirEntry) -> str:
    """What the log calls a file that is left out; '' for one that nobody misses."""
    name, kind = entry.name, extension(entry.name)
    if is_leaving(name):
        return 'hidden images' if kind in EXTENSIONS else ''
    if not is_kind(entry.is_file):
        return 'broken links' if entry.is_symlink() else 'special files'
    return f'{kind} ({REMEDIES[kind]})' if kind in REMEDIES else kind or 'without extension'


def log_listing(folder: str, listing: Listing) -> Listing:
    """Say what was left out of a folder."""
    log_left_out(folder, listing.left_out)
    return listing


def log_left_out(source: str, left_out: Mapping[str, int]) -> None:
    """Say in one line how much of a folder or of shards was not used, by kind; once within :func:`listed_once`."""
    left_out = {kind: count for kind, count in left_out.items() if count}
    if left_out:
        kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
        line = printable(f'Left out of {source}: {", ".join(f"{count} {kind}" for kind, count in kinds)}.')
        remember(line, lambda: print_log(line, logger='current'))
