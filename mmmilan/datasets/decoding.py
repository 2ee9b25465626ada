"""An image file as pixels, or the sentence that says why it is none."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import cv2
import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.fileio import get
from PIL import Image

from mmmilan.datasets.depth import read_deep, white_of
from mmmilan.errors import InputError
from mmmilan.files import first_line
from mmmilan.registry import TRANSFORMS

MAX_PIXELS = 1 << 28  # 0.8 GB when decoded
MAX_BYTES = 1 << 30
ORIENTATION = 0x0112  # EXIF tag


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
        InputError: naming the image if there is no such file, or its annotations are of another size.
    """

    def __init__(self, backend_args: dict | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.backend_args = backend_args
        self.max_pixels = max_pixels

    def transform(self, results: dict) -> dict:
        # inferencers bring arrays
        image = results['img'] if 'img' in results else self.read(results['img_path'])
        height, width = image.shape[:2]
        declared = results.get('height', height), results.get('width', width)  # by COCO's annotations
        if declared != (height, width):
            raise InputError(
                f'{results["img_path"]} is {width} x {height}, but {declared[1]} x {declared[0]} (width x height) in '
                'its annotations; correct these, or put the image there that they are of.'
            )
        results.update(img=image, img_shape=(height, width), ori_shape=(height, width))
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


def orientation_of(image: Image.Image) -> int:
    """How EXIF says an image is to be turned: 1, not at all, to 8; from 5 on, width and height are exchanged."""
    orientation = image.getexif().get(ORIENTATION, 1) if 'exif' in image.info else 1
    return orientation if orientation in range(1, 9) else 1


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
        elif content[8:12] == b'WEBP':
            image = read_webp(content)
        else:
            image = mmcv.imfrombytes(content, flag=flag, backend='cv2') if content else None
    except (cv2.error, OSError, MemoryError) as error:
        raise CorruptImageError(f'{path} does not decode ({first_line(error)}); replace or remove it.') from error
    if image is None:
        raise CorruptImageError(f'{path} does not decode as an image; replace or remove it.')
    return image


def read_webp(content: bytes) -> np.ndarray | None:
    """A WebP file as BGR uint8 [H, W, 3], turned as its EXIF orientation says, which OpenCV does not do; None if it
    does not decode."""
    image = mmcv.imfrombytes(content, flag='color_ignore_orientation', backend='cv2')
    if image is None:
        return None
    orientation = 1
    with suppress(Exception), header_of(content) as header:  # of any type; a damaged EXIF turns nothing
        orientation = orientation_of(header)
    if orientation >= 5:  # mirrored at the diagonal, and then as one of the first four
        image, orientation = image.transpose(1, 0, 2), {5: 1, 6: 2, 8: 4, 7: 3}[orientation]
    flip = {2: 1, 3: -1, 4: 0}.get(orientation)
    return np.ascontiguousarray(image if flip is None else cv2.flip(image, flip))
