"""Images in folders and tar shards, with or without labels."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.fileio import LocalBackend, exists, get_file_backend
from mmengine.structures import BaseDataElement
from mmpretrain.datasets import CustomDataset
from torch.utils.data import get_worker_info

from mmmilan.datasets.classes import as_name, datasets_in, locate, match_names, positions
from mmmilan.datasets.decoding import EXTENSIONS, CorruptImageError
from mmmilan.datasets.listing import Names, decoded, is_leaving, list_pictures, log_left_out, remember
from mmmilan.datasets.packed import list_lmdb, load_index, refuse_archive
from mmmilan.datasets.reproducible import Draw, seeded
from mmmilan.errors import InputError, printable, warn
from mmmilan.files import extension, read_lines
from mmmilan.registry import DATASETS

MAX_CORRUPT_IN_A_ROW = 100
LABEL = np.dtype('<i4')
MAX_WORKERS = 1024  # of a data loader, whose counts are kept apart
ENDINGS = f'{", ".join(EXTENSIONS)} or .tar'
Source = str | os.PathLike  # a folder of images and tar shards, however nested; a tar shard; or an image


def list_images(sources: Source | Sequence[Source]) -> Names:
    """All images of one or several sources, sorted by path within each source; no label maps beside them.

    Returns:
        Paths; an image in a shard has the path ``tar://...`` of :class:`mmmilan.datasets.packed.TarBackend`.

    Raises:
        InputError: a source does not exist, or holds no image.
    """
    return Names.joined([images_in(source) for source in as_sources(sources)])


def as_sources(sources: Source | Sequence[Source]) -> list[Source]:
    """A single source as a list of one, and several as a list."""
    return [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)


def images_in(source: Source) -> Names:
    """As :func:`list_images`, of one source; within :func:`listed_once` the same for each call."""
    path = os.path.expanduser(os.fspath(source))
    return remember(('images', path), lambda: _images_in(source, path))


def _images_in(source: Source, path: str) -> Names:
    if os.path.isdir(path):
        images, _ = expand_shards(path, list_pictures(path).files)
    elif not os.path.exists(path):
        raise InputError(f'{source} does not exist; give a folder of images, a tar file or an image.')
    elif extension(path) in (*EXTENSIONS, '.tar'):
        images, _ = expand_shards('', [path])
    else:
        refuse_archive(path)
        images = Names()
    if not images:
        raise InputError(f'{source} holds no image; it should hold files that end in {ENDINGS}.')
    return images


def expand_shards(folder: str, files: Sequence[str]) -> tuple[Names, np.ndarray]:
    """Each image of the files in a folder, those in tar shards too.

    Returns:
        Paths of the images, as :func:`list_images` gives them, and in which of the files each is: [M], int.
    """
    shards = [i for i, file in enumerate(files) if file[-4:].lower() == '.tar']
    files = files if isinstance(files, Names) else Names(files)
    images = files.within(folder) if folder else files
    if not shards:
        return images, np.arange(len(images))
    unused: Counter[str] = Counter()
    paths, counts = list(images), np.ones(len(images), int)
    for i in shards:
        index = remember(images[i], partial(load_index, Path(images[i])))
        unused.update(index.unused)
        paths[i], counts[i] = [image for image, _ in index.samples], len(index.samples)
    log_left_out(f'the shards in {folder}' if folder else images[-1], unused)
    flat = chain.from_iterable([each] if isinstance(each, str) else each for each in paths)
    return Names(flat), np.repeat(np.arange(len(counts)), counts)


def first_folder_of(files: Names, names: Sequence[str]) -> np.ndarray:
    """Which of some names is the first folder of each file: [M], int."""
    number = {name: i for i, name in enumerate(names)}
    return np.fromiter((number[file.partition('/')[0]] for file in files), int, len(files))


class Records(Sequence[dict]):
    """The records of a data set: paths of images, and labels if there are any, [M], int32."""

    def __init__(self, paths: Names, labels: np.ndarray | None = None) -> None:
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record = dict(img_path=self.paths[index])
        return record if self.labels is None else record | dict(gt_label=int(self.labels[index]))

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """All records in bytes, uint8, each its path, a zero byte and maybe the label; and where each ends, int64."""
        content, ends = np.frombuffer(self.paths.content, np.uint8), self.paths.ends
        if self.labels is None:
            return content, ends
        size, count = LABEL.itemsize, len(ends)
        after = ends[:, None] + np.arange(size) + size * np.arange(count)[:, None]  # where the labels go
        is_path, packed = np.ones(len(content) + size * count, bool), np.empty(len(content) + size * count, np.uint8)
        is_path[after] = False
        packed[is_path], packed[after] = content, self.labels.astype(LABEL).view(np.uint8).reshape(count, size)
        return packed, ends + size * np.arange(1, count + 1)


class SharedCount:
    """A number that the data workers of a process share; a copy or a pickle of it counts on its own from there."""

    def __init__(self, counts: torch.Tensor | None = None) -> None:
        counts = torch.zeros(1 + MAX_WORKERS, dtype=torch.int64) if counts is None else counts
        self.counts = counts.share_memory_()  # one for each worker, so that no lock is needed

    def increase(self) -> None:
        """Add one."""
        worker = get_worker_info()
        self.counts[1 + worker.id % MAX_WORKERS if worker else 0] += 1

    def total(self) -> int:
        """The number."""
        return int(self.counts.sum())

    def __reduce__(self) -> tuple:
        to_worker = multiprocessing.context.get_spawning_popen() is not None
        return SharedCount, (self.counts if to_worker else self.counts.clone(),)


def num_corrupt(dataset: object) -> int:
    """How many images of a data set, or of those in a wrapper, did not decode."""
    return sum(getattr(each, 'num_corrupt', 0) for each in datasets_in(dataset))


def mark_replaced(sample: Any) -> None:
    """Note in a packed sample, of several views too, that it stands in for one that does not decode."""
    records = sample.get('data_samples') if isinstance(sample, dict) else None
    for record in records if isinstance(records, list) else [records]:
        if isinstance(record, BaseDataElement):
            record.set_metainfo(dict(replaced=True))


def is_replaced(record: Mapping[str, Any] | BaseDataElement) -> bool:
    """Whether a sample stands in for one that does not decode, so that no score counts it."""
    return bool(record.get('replaced'))


@DATASETS.register_module()
class ImageFolder(CustomDataset):
    """Every image below a folder, however nested, those in tar shards too.

    Args:
        data_root: The folder.
        with_label: Take the names of the first level of folders as classes, in the order of ``metainfo.classes`` if
            there is one.
        on_corrupt: What to do with an image that does not decode: 'skip' replaces it by another image, which no score
            counts, names it in the log and counts it in ``num_corrupt``; 'raise' stops.
        backend_args: MMEngine's file backend that holds the images; the transform that loads them needs the same.
            With ``dict(backend='lmdb', db_path=...)`` the images are the keys of that database, which
            ``tools/pack_images.py`` makes of a folder.
        kwargs: Other arguments of mmpretrain's ``CustomDataset``.

    Raises:
        InputError: the folder is missing or holds no image, or its folders are not the classes that were given.
    """

    def __init__(
        self,
        data_root: str,
        with_label: bool = False,
        on_corrupt: str = 'skip',
        backend_args: dict | None = None,
        **kwargs,
    ) -> None:
        if on_corrupt not in ('skip', 'raise'):
            raise InputError(f"on_corrupt={on_corrupt!r} is unknown; choose 'skip' or 'raise'.")
        self.on_corrupt = on_corrupt
        self.backend_args = backend_args
        self._num_corrupt = SharedCount()
        super().__init__(data_root=data_root, with_label=with_label, extensions=EXTENSIONS, **kwargs)

    @property
    def num_corrupt(self) -> int:
        """How many times an image did not decode, in all data workers together."""
        return self._num_corrupt.total()

    def load_data_list(self) -> Sequence[dict]:
        if (self.backend_args or {}).get('backend') == 'lmdb':
            return self.load_lmdb_list(self.backend_args['db_path'])
        self.check_folder()
        if os.path.isfile(self.ann_file):
            return self.load_list()
        if self.ann_file or not isinstance(get_file_backend(self.img_prefix, enable_singleton=True), LocalBackend):
            try:
                return super().load_data_list()
            except RuntimeError as error:  # mmpretrain found no sample
                raise InputError(
                    f'The data folder {self.img_prefix} holds no image; it should hold files that end in {ENDINGS}.'
                ) from error
        if self.with_label:
            return self.load_labelled_list()
        return Records(images_in(self.img_prefix))

    def load_list(self) -> list[dict]:
        """As :meth:`load_data_list`, from the lines of ``ann_file``: paths, with labels each before its class's number.

        Raises:
            InputError: the file cannot be read, or a line has no number.
        """
        join = get_file_backend(self.img_prefix, enable_singleton=True).join_path
        lines = read_lines(self.ann_file)
        if not self.with_label:
            return [dict(img_path=join(self.img_prefix, line)) for line in lines]
        rows = [re.fullmatch(r'(.+)\s(-?\d+)', line) for line in lines]
        if not all(rows):
            raise InputError(
                f'{self.ann_file} has the line {lines[rows.index(None)]!r}; write the path of an image, a space and '
                'the number of its class.'
            )
        return [dict(img_path=join(self.img_prefix, row[1].rstrip()), gt_label=int(row[2])) for row in rows]

    def check_folder(self) -> None:
        """Raise an :class:`InputError` if the folder does not exist."""
        if not get_file_backend(self.img_prefix, enable_singleton=True).isdir(self.img_prefix):
            refuse_archive(self.img_prefix)
            raise InputError(
                f'The data folder {self.img_prefix} does not exist; set data_root to the folder of images.'
            )

    def is_valid_file(self, filename: str) -> bool:
        """Whether a key of a database, or a file on a server, is an image."""
        return super().is_valid_file(filename) and not any(map(is_leaving, filename.split('/')))

    def load_labelled_list(self) -> Records:
        """As :meth:`load_data_list`, labelled by the first folder of each path, and in the order of folders."""
        listing = list_pictures(self.img_prefix, classes=True)
        names = listing.top_folders
        loose = sum('/' not in file for file in listing.files)
        files = Names(file for file in listing.files if '/' in file) if loose else listing.files
        log_left_out(self.img_prefix, {'images in no folder of a class': loose})
        folders = first_folder_of(files, names)
        if (np.diff(folders) < 0).any():  # `a-b/c` before `a/c`
            order = np.argsort(folders, kind='stable')
            files, folders = Names(map(list(files).__getitem__, order)), folders[order]
        images, file_of = expand_shards(self.img_prefix, files)
        if not images:
            raise InputError(f'{self.img_prefix} has no image in the folder of a class; they should end in {ENDINGS}.')
        counts = np.bincount(folders[file_of], minlength=len(names))
        label = self.label_folders(dict(zip(names, counts.tolist(), strict=True)))
        empty = [names[i] for i in np.setdiff1d(np.arange(len(counts)), folders)]
        if empty:
            warn(printable(f'{self.img_prefix} has folders without images: {", ".join(empty)}.'))
        labels = np.array([-1 if label[name] is None else label[name] for name in names])
        return Records(images, labels[folders[file_of]])

    def _find_samples(self) -> list:
        """As mmpretrain's, on a server, but classes that were given are matched by name."""
        given = self._metainfo.pop('classes', None)
        samples = super()._find_samples()
        if self.with_label:
            counts, folders = Counter(number for _, number in samples), list(self.folder_to_idx)
            self._metainfo['classes'] = given
            label = self.label_folders({name: counts[number] for number, name in enumerate(folders)})
            samples = [(path, label[folders[number]]) for path, number in samples]
        return samples

    def load_lmdb_list(self, db_path: str) -> list[dict]:
        """As :meth:`load_data_list`, from the keys of an LMDB."""
        paths = [path for path in list_lmdb(db_path) if self.is_valid_file(path)]
        if not paths:
            raise InputError(f'The database {db_path} holds no image; make it with tools/pack_images.py.')
        if not self.with_label:
            return [dict(img_path=path) for path in paths]
        loose, paths = len(paths), [path for path in paths if '/' in path]
        log_left_out(db_path, {'images in no folder of a class': loose - len(paths)})
        if not paths:
            raise InputError(f'The database {db_path} has no image in the folder of a class; pack folders of classes.')
        label = self.label_folders(dict(sorted(Counter(path.split('/')[0] for path in paths).items())))
        return [dict(img_path=path, gt_label=label[path.split('/')[0]]) for path in paths]

    def label_folders(self, folders: dict[str, int]) -> dict[str, int | None]:
        """The label of each class folder: its place among the classes that were given, or else among the folders.

        Args:
            folders: Names, and how many images each has.

        Returns:
            Labels; None for a folder without images that is none of the classes.

        Raises:
            InputError: a folder of images is none of the classes that were given.
        """
        images: Counter[str] = Counter()
        for name, count in folders.items():
            images[as_name(name)] += count
        names = list(images)
        classes, where = self.CLASSES or tuple(names), locate(self)
        numbers = match_names(
            names, classes, where, f'metainfo.classes of {where}', lambda: Counter(dict(enumerate(images.values())))
        )
        self._metainfo['classes'] = tuple(classes)
        self.folder_to_idx = positions(classes, where)
        label = dict(zip(names, numbers, strict=True))
        return {name: label[as_name(name)] for name in folders}

    def _serialize_data(self) -> tuple[np.ndarray, np.ndarray]:
        """As MMEngine's, but :class:`Records` are packed without pickles, and others freed as they are written."""
        self.is_packed = isinstance(self.data_list, Records)
        if self.is_packed:
            packed, self.data_list = self.data_list.packed(), []
            return packed
        content, ends = bytearray(), np.empty(len(self.data_list), np.int64)
        for i, record in enumerate(self.data_list):
            content += pickle.dumps(record, protocol=4)
            ends[i], self.data_list[i] = len(content), None
        self.data_list.clear()
        return np.frombuffer(content, np.uint8), ends

    def get_data_info(self, idx: int) -> dict:
        """The record of sample ``idx``."""
        if not self._fully_initialized:
            self.full_init()
        if not self.serialize_data or not self.is_packed:
            return super().get_data_info(idx)
        number = range(len(self))[idx]
        begin = self.data_address[number - 1] if number else 0
        path, _, label = self.data_bytes[begin : self.data_address[number]].tobytes().partition(b'\0')
        record = dict(img_path=decoded(path), sample_idx=number)
        return record | dict(gt_label=int.from_bytes(label, 'little')) if label else record

    def get_gt_labels(self) -> np.ndarray:
        """The label of each image: [M], int."""
        if not self._fully_initialized:
            self.full_init()
        if not self.with_label or not self.serialize_data or not self.is_packed:
            return super().get_gt_labels()
        size = LABEL.itemsize
        return self.data_bytes[self.data_address[:, None] + np.arange(-size, 0)].view(LABEL)[:, 0].astype(int)

    def __getitem__(self, index: int) -> dict:
        """Sample ``index`` after the pipeline; a :class:`Draw` in place of a number also fixes the augmentations."""
        if not self._fully_initialized:
            self.full_init()
        with seeded(index) if isinstance(index, Draw) else nullcontext():
            return self.load_or_replace(int(index))

    def prepare_data(self, index: int, stands_in: bool = False) -> dict:
        """Sample ``index`` after the pipeline; a file deleted since the start counts as one that does not decode.

        The steps of the pipeline are told if it stands in for another one, which does not decode.
        """
        try:
            return self.pipeline(self.get_data_info(index) | (dict(stands_in=True) if stands_in else {}))
        except InputError as error:
            path = self.get_data_info(index)['img_path']
            if isinstance(error, CorruptImageError) or self.backend_args or exists(path):
                raise
            raise CorruptImageError(str(error)) from error

    def load_or_replace(self, index: int) -> dict:
        """Sample ``index``, or a random other one if the image does not decode and ``on_corrupt`` is 'skip'."""
        fault = ''
        for _ in range(MAX_CORRUPT_IN_A_ROW):
            try:
                sample = self.prepare_data(index, bool(fault))
                if fault:
                    mark_replaced(sample)
                return sample
            except CorruptImageError as error:
                if self.on_corrupt == 'raise':
                    raise
                self._num_corrupt.increase()
                warn(f'Skipped: {error}')
                fault, index = str(error), np.random.randint(len(self))
        raise InputError(
            f'{MAX_CORRUPT_IN_A_ROW} images in a row under {self.img_prefix} cannot be used; mend or remove them, e.g. '
            f'{fault}'
        )


@DATASETS.register_module()
class ImageSources(ImageFolder):
    """The images of several sources, without labels.

    Args:
        sources: Folders (however nested), tar shards and images.
        kwargs: Other arguments of :class:`ImageFolder`, except ``data_root`` and ``with_label``.

    Raises:
        InputError: a source does not exist or holds no image.
    """

    def __init__(self, sources: Sequence[str], **kwargs) -> None:
        self.sources = sources
        super().__init__(data_root=str(sources[0]), **kwargs)

    def load_data_list(self) -> Sequence[dict]:
        return Records(list_images(self.sources))
