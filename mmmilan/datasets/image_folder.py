"""Images in folders, with or without labels."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import cv2
import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.fileio import LocalBackend, exists, get, get_file_backend
from mmengine.logging import print_log
from mmpretrain.datasets import CustomDataset
from mmpretrain.datasets.custom import find_folders
from PIL import Image

from mmmilan.datasets.depth import read_deep, white_of
from mmmilan.datasets.packed import list_lmdb
from mmmilan.datasets.reproducible import Draw, seeded
from mmmilan.errors import InputError
from mmmilan.files import first_line
from mmmilan.registry import DATASETS, TRANSFORMS

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
MAX_CORRUPT_IN_A_ROW = 100
MAX_PIXELS = 1 << 28  # 0.8 GB when decoded
MAX_BYTES = 1 << 30


class CorruptImageError(InputError):
    """An image that does not decode."""


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Read ``results['img_path']`` through MMEngine's file backends into ``results['img']``, BGR uint8 [H, W, 3].

    Args:
        backend_args: MMEngine's file backend, e.g. ``dict(backend='lmdb', db_path='train.lmdb')``; None tells it
            from the path.
        max_pixels: Larger images are treated as corrupt.

    Raises:
        CorruptImageError: naming the image if it does not decode, is too large, or is a JPEG that ends too early
            (which OpenCV would fill up with grey).
        InputError: naming the image if there is no such file.
    """

    def __init__(self, backend_args: dict | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.backend_args = backend_args
        self.max_pixels = max_pixels

    def transform(self, results: dict) -> dict:
        # inferencers bring arrays
        image = results['img'] if 'img' in results else self.read(results['img_path'])
        results.update(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        return results

    def read(self, path: str) -> np.ndarray:
        return decode(read_bytes(path, self.backend_args), path, max_pixels=self.max_pixels)


def read_bytes(path: str, backend_args: dict | None = None) -> bytes:
    """The content of an image file.

    Raises:
        CorruptImageError: naming the image if it is no regular file of at most ``MAX_BYTES``, or cannot be read.
        InputError: naming the image if there is no such file.
    """
    try:
        if not backend_args and '://' not in str(path):
            state = os.stat(path)
            if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_BYTES:  # a pipe would be waited for
                raise CorruptImageError(f'{path} is no file of at most {MAX_BYTES >> 20} MiB; replace or remove it.')
        content = get(path, backend_args)
    except FileNotFoundError:
        content = None
    except (OSError, MemoryError) as error:
        raise CorruptImageError(f'{path} cannot be read ({first_line(error)}); replace or remove it.') from error
    if content is None:  # so MMEngine's LMDB backend says it
        raise InputError(
            f'The image {path} is missing; set data_root and data_prefix of the data set to where it is, or drop '
            'it from the annotations.'
        )
    return content


def is_truncated_jpeg(content: bytes) -> bool:
    """Whether a file is a JPEG whose last scan has no end."""
    return content[:2] == b'\xff\xd8' and content.rfind(b'\xff\xd9') < content.rfind(b'\xff\xda')


@contextmanager
def header_of(content: bytes) -> Iterator[Image.Image]:
    """An image file as Pillow opens it, of any size: the limit is ours. Nothing is decoded."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(content)) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def check_pixels(content: bytes, path: str, max_pixels: int) -> None:
    """Raise a :class:`CorruptImageError` for an image of more pixels, before they take up memory."""
    try:
        with header_of(content) as image:
            width, height = image.size
    except Exception:  # of any type; decoding it will say what is wrong
        return
    if width * height > max_pixels:
        raise CorruptImageError(
            f'{path} has {width} x {height} pixels; make it smaller, or raise max_pixels={max_pixels} of its transform.'
        )


def decode(content: bytes, path: str, flag: int | str = 'color', max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
    """An image file as BGR uint8 [H, W, 3], turned as its EXIF orientation says.

    A grey image has its values in all three channels. 16 bits are scaled linearly from 0 to 65535, whatever the least
    and the greatest of the image, see :func:`mmmilan.datasets.depth.to_8_bits`. Transparency of a PNG is dropped.

    Args:
        content: The file.
        path: Its name, for the error.
        flag: 'color', or OpenCV's ``IMREAD_REDUCED_COLOR_2``, ``_4`` or ``_8``.
        max_pixels: How many there may be; None does not look.

    Raises:
        CorruptImageError: if it does not decode, is a JPEG that ends too early, or has too many pixels.
        InputError: if it has other channels than grey or RGB, or numbers that are no pixels.
    """
    if is_truncated_jpeg(content):
        raise CorruptImageError(f'{path} is a truncated JPEG; replace or remove it.')
    if max_pixels is not None:
        check_pixels(content, path, max_pixels)
    try:
        if white := white_of(content, path):
            image = read_deep(content, white)
        else:
            image = mmcv.imfrombytes(content, flag=flag, backend='cv2') if content else None
    except (cv2.error, OSError, MemoryError) as error:
        raise CorruptImageError(f'{path} does not decode ({first_line(error)}); replace or remove it.') from error
    if image is None:
        raise CorruptImageError(f'{path} does not decode as an image; replace or remove it.')
    return image


def list_images(folder: str, prefix: str = '', above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Paths below a folder of all images in it, however nested, in no order; hidden ones are left out.

    A folder that cannot be read is named in the log. A link to a folder above it (``above``) is not followed.
    """
    try:
        state = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        print_log(f'Skipped: {folder} cannot be read ({error.strerror}).', logger='current', level=logging.WARNING)
        return
    here = (state.st_dev, state.st_ino)
    if here in above:
        return
    for entry in entries:
        with suppress(OSError):  # a link to itself
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith('.') and entry.is_file():
                yield prefix + entry.name
            elif entry.is_dir():
                yield from list_images(entry.path, f'{prefix}{entry.name}/', (*above, here))


@DATASETS.register_module()
class ImageFolder(CustomDataset):
    """Every image below a folder, however nested.

    Args:
        data_root: The folder.
        with_label: Take the names of the first level of folders as classes.
        on_corrupt: What to do with an image that does not decode: 'skip' takes another one in its place, names
            it in the log and counts it in ``num_corrupt``; 'raise' stops.
        backend_args: MMEngine's file backend that holds the images; the transform that loads them needs the same.
            With ``dict(backend='lmdb', db_path=...)`` the images are the keys of that database, which
            ``tools/pack_images.py`` makes of a folder.
        kwargs: Other arguments of mmpretrain's ``CustomDataset``.

    Raises:
        InputError: if the folder is missing or holds no image.
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
        self._num_corrupt = multiprocessing.Value('q', 0)  # shared with the data workers
        super().__init__(data_root=data_root, with_label=with_label, extensions=EXTENSIONS, **kwargs)

    @property
    def num_corrupt(self) -> int:
        """Number of times that an image did not decode, in all data workers."""
        return self._num_corrupt.value

    def load_data_list(self) -> list[dict]:
        if (self.backend_args or {}).get('backend') == 'lmdb':
            return self.load_lmdb_list(self.backend_args['db_path'])
        backend = get_file_backend(self.img_prefix, enable_singleton=True)
        if not backend.isdir(self.img_prefix):
            raise InputError(
                f'The data folder {self.img_prefix} does not exist; set data_root to the folder of images.'
            )
        try:
            return super().load_data_list()
        except RuntimeError as error:  # mmpretrain found no sample
            raise InputError(
                f'The data folder {self.img_prefix} holds no image; it should hold files that end in '
                f'{", ".join(EXTENSIONS)}.'
            ) from error

    def _find_samples(self) -> list:
        """As mmpretrain's, which takes five times as long to list a folder."""
        if not isinstance(get_file_backend(self.img_prefix, enable_singleton=True), LocalBackend):
            return super()._find_samples()
        if not self.with_label:
            samples = sorted(list_images(self.img_prefix))
        else:
            classes, self.folder_to_idx = find_folders(self.img_prefix)
            if self.CLASSES is None:
                self._metainfo['classes'] = tuple(classes)
            elif len(self.CLASSES) != len(classes):
                raise InputError(
                    f'{self.img_prefix} has {len(classes)} folders for {len(self.CLASSES)} classes; make them equal.'
                )
            paths = {name: sorted(list_images(os.path.join(self.img_prefix, name))) for name in classes}
            samples = [(f'{name}/{path}', self.folder_to_idx[name]) for name in classes for path in paths[name]]
            empty = [name for name in classes if not paths[name]]
            if empty:
                message = f'{self.img_prefix} has folders without images: {", ".join(empty)}.'
                print_log(message, logger='current', level=logging.WARNING)
        if not samples:
            raise RuntimeError  # as mmpretrain does
        return samples

    def load_lmdb_list(self, db_path: str) -> list[dict]:
        paths = [path for path in list_lmdb(db_path) if self.is_valid_file(path)]
        if not paths:
            raise InputError(f'The database {db_path} holds no image; make it with tools/pack_images.py.')
        if not self.with_label:
            return [dict(img_path=path) for path in paths]
        classes = sorted({path.split('/')[0] for path in paths})
        self._metainfo['classes'] = tuple(classes)
        label = {name: i for i, name in enumerate(classes)}
        return [dict(img_path=path, gt_label=label[path.split('/')[0]]) for path in paths]

    def __getitem__(self, index: int | Draw) -> dict:
        """Sample ``index`` after the pipeline, its augmentations fixed by a :class:`Draw` if it is one."""
        if not self._fully_initialized:
            self.full_init()
        draw = index if isinstance(index, Draw) else None
        with seeded(draw) if draw else nullcontext():
            return self.load_or_replace(draw.index if draw else index)

    def prepare_data(self, index: int) -> dict:
        """Sample ``index`` after the pipeline; an image that is gone since is treated as one that does not decode."""
        try:
            return super().prepare_data(index)
        except InputError as error:
            path = self.get_data_info(index)['img_path']
            if isinstance(error, CorruptImageError) or self.backend_args or exists(path):
                raise
            raise CorruptImageError(str(error)) from error

    def load_or_replace(self, index: int) -> dict:
        for _ in range(MAX_CORRUPT_IN_A_ROW):
            try:
                return self.prepare_data(index)
            except CorruptImageError as error:
                if self.on_corrupt == 'raise':
                    raise
                with self._num_corrupt.get_lock():
                    self._num_corrupt.value += 1
                print_log(f'Skipped: {error}', logger='current', level=logging.WARNING)
                index = np.random.randint(len(self))
        raise InputError(f'{MAX_CORRUPT_IN_A_ROW} images in a row under {self.img_prefix} do not decode.')
