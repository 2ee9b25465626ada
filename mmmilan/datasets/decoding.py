"""Decode image files to pixels, or say what is wrong with the file.

OpenCV decodes JPEG, PNG, TIFF, WebP, BMP and PNM; Pillow the rest of ``EXTENSIONS``, and HEIC with the package
pillow-heif. The first bytes of a file decide, not its name.
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import cv2
import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.fileio import get
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

from mmmilan.errors import CorruptImageError, InputError, warn
from mmmilan.files import extension, first_line
from mmmilan.registry import TRANSFORMS

MAX_PIXELS = 1 << 28  # 0.8 GB when decoded
MAX_BYTES = 1 << 30
MAX_ASPECT_RATIO = 200  # a strip of 1 x 60000 pixels takes 12 GB once its short side is resized to 256
ORIENTATION = 0x0112  # EXIF tag

HEIC = ('.heic', '.heif', '.hif')
AVIF = ('.avif',)
EXTENSIONS = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.bmp', '.dib', '.tif', '.tiff', '.webp')
EXTENSIONS += ('.ppm', '.pgm', '.pbm', '.pnm', '.gif', '.jp2', '.j2k', '.jpx')
ARCHIVES = ('.zip', '.gz', '.tgz', '.bz2', '.tbz', '.tbz2', '.xz', '.txz', '.zst', '.tzst', '.lz4', '.z', '.7z', '.rar')
# Files that hold images and are not read, by extension, with what makes them so.
REMEDIES = dict.fromkeys(ARCHIVES, 'unpack it')
if find_spec('pillow_heif'):
    EXTENSIONS += HEIC
else:
    REMEDIES |= dict.fromkeys(HEIC, 'pip install pillow-heif')
if 'avif' in features.modules and features.check('avif'):
    EXTENSIONS += AVIF
else:
    REMEDIES |= dict.fromkeys(AVIF, 'pip install -U pillow')

_MARKER = re.compile(rb'\xff[\x01-\xcf\xd8-\xfe]')  # not a stuffed byte, a restart or a fill byte
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
# GIF, JPEG 2000 (file and bare codestream), and the ISO media container of AVIF and HEIC.
_FOR_PILLOW = re.compile(rb'GIF8|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftyp', re.DOTALL)


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Read ``results['img_path']`` through MMEngine's file backends into ``results['img']``, BGR uint8 [H, W, 3].

    Args:
        backend_args: MMEngine's file backend, e.g. ``dict(backend='lmdb', db_path='train.lmdb')``; None infers it
            from the path.
        max_pixels: Larger images are treated as corrupt.

    Raises:
        CorruptImageError: the image does not decode, is too large, or is a truncated JPEG (which OpenCV would fill up
            with grey).
        InputError: there is no such file, or the image has another size in its annotations.
    """

    def __init__(self, backend_args: dict | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.backend_args = backend_args
        self.max_pixels = max_pixels

    def transform(self, results: dict) -> dict:
        # inferencers pass arrays
        image = results['img'] if 'img' in results else self.read(results['img_path'])
        height, width = image.shape[:2]
        declared = results.get('height', height), results.get('width', width)  # in COCO's annotations
        if declared != (height, width):
            raise InputError(
                f'{results["img_path"]} is {width} x {height}, but {declared[1]} x {declared[0]} (width x height) in '
                'its annotations; correct the annotations, or restore the image that was annotated.'
            )
        results.update(img=image, img_shape=(height, width), ori_shape=(height, width))
        return results

    def read(self, path: str) -> np.ndarray:
        """Read and decode a file -> BGR uint8 [H, W, 3]."""
        return decode(read_bytes(path, self.backend_args), path, max_pixels=self.max_pixels)


def read_bytes(path: str, backend_args: dict | None = None) -> bytes:
    """The content of an image file.

    Raises:
        CorruptImageError: the path is not a regular file of at most ``MAX_BYTES``, or the file cannot be read.
        InputError: there is no such file, or nothing that reads its address.
    """
    try:
        if not backend_args and '://' not in str(path):
            state = os.stat(path)
            if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_BYTES:  # reading a pipe would block
                raise CorruptImageError(
                    f'{path} is not a regular file of at most {MAX_BYTES >> 20} MiB; replace or remove it.'
                )
        content = get(path, backend_args)
    except FileNotFoundError:
        content = None
    except (ImportError, KeyError) as error:  # a scheme that MMEngine does not know, or whose package is missing
        raise InputError(
            f'{path} cannot be read by MMEngine ({type(error).__name__}: {first_line(error)}); give a file, an http '
            'address, or the backend_args of what holds it.'
        ) from error
    except (OSError, MemoryError) as error:
        raise CorruptImageError(f'{path} cannot be read ({first_line(error)}); replace or remove it.') from error
    if content is None:  # MMEngine's LMDB backend returns None for a missing key
        raise InputError(
            f'The image {path} is missing; set data_root and data_prefix of the data set to where it is, or drop '
            'it from the annotations.'
        )
    return content


def is_truncated_jpeg(content: bytes) -> bool:
    """Whether a file is a JPEG whose last scan does not end.

    Its markers are read as a decoder reads them: those in segments (a thumbnail in EXIF) and those after the end (the
    film of a motion photo, the further images of a panorama) do not count.
    """
    if content[:2] != b'\xff\xd8':
        return False
    position, in_scan = 2, False
    while marker := _MARKER.search(content, position):
        position, kind = marker.end(), content[marker.end() - 1]
        if kind == _EOI:
            return False
        if kind == _SOI and in_scan:  # the next image in the file begins
            return True
        if kind not in (_SOI, 0x01):  # a segment; its length includes the two bytes of the length
            position += max(2, int.from_bytes(content[position : position + 2], 'big'))
        in_scan = in_scan or kind == _SOS
    return in_scan


@contextmanager
def images_of_any_size() -> Iterator[None]:
    """Within this context Pillow has no limit on the size of an image; threads that open images need it around them."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def open_header(content: bytes | str) -> Iterator[Image.Image]:
    """Open an image, the content or the path of a file, without decoding it and without Pillow's limit on its size."""
    with images_of_any_size():
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                yield image
        except UnidentifiedImageError as error:  # its message has the address of the BytesIO
            raise UnidentifiedImageError('no image that Pillow knows') from error


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 (upright) to 8; from 5 on, width and height are swapped.

    Pillow takes that of XMP where EXIF has none, which OpenCV and browsers do not.
    """
    exif = Image.Exif()
    with suppress(Exception):  # of any type; a damaged EXIF is ignored
        exif.load(image.info.get('exif', b''))
    orientation = exif.get(ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def orientation_of(content: bytes) -> int:
    """The EXIF orientation of a file; 1 for one whose header cannot be read."""
    if any(mark in content for mark in (b'Exif\0\0', b'eXIf', b'EXIF')):  # of JPEG, PNG, WebP
        with suppress(Exception), open_header(content) as header:  # of any type; decoding says what is wrong
            return exif_orientation(header)
    return 1


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate an image [H, W, ...] by an EXIF orientation."""
    if orientation >= 5:  # a transpose, followed by one of the first four
        image, orientation = image.swapaxes(0, 1), {5: 1, 6: 2, 8: 4, 7: 3}[orientation]
    rows, columns = (slice(None, None, -1 if orientation in turned else 1) for turned in ((3, 4), (2, 3)))
    return np.ascontiguousarray(image[rows, columns])


def read_size(path: str) -> tuple[int, int]:
    """Width and height of an image file after its EXIF orientation, from its header.

    Raises:
        CorruptImageError: it is no image.
        InputError: there is no such file.
    """
    if '://' not in path and os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block
        raise CorruptImageError(f'{path} is not a regular file; replace or remove it.')
    register_heif()
    try:
        with open_header(read_bytes(path) if '://' in path else path) as image:
            return image.size[::-1] if exif_orientation(image) >= 5 else image.size
    except FileNotFoundError:
        raise InputError(f'The image {path} is missing; put it there, or drop it from the annotations.') from None
    except Exception as error:  # of any type, as the file may hold anything
        raise CorruptImageError(f'{path} does not decode ({first_line(error)}); replace or remove it.') from error


def check_pixels(content: bytes, path: str, max_pixels: int) -> None:
    """Raise a :class:`CorruptImageError` for an image of more pixels, without decoding it."""
    try:
        with open_header(content) as image:
            width, height = image.size
    except Exception:  # of any type; decoding the image will say what is wrong
        return
    if width * height > max_pixels:
        raise CorruptImageError(
            f'{path} has {width} x {height} pixels; make it smaller, or raise max_pixels={max_pixels} of its transform.'
        )


def decode(content: bytes, path: str, flag: int | str = 'color', max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
    """Decode an image file -> BGR uint8 [H, W, 3], rotated by its EXIF orientation.

    Grey values are repeated in the three channels. 16-bit values are scaled from [0, 65535] to [0, 255], whatever the
    range of the image, see :func:`mmmilan.datasets.decoding.to_8_bits`. The alpha channel of a PNG is dropped.

    Args:
        content: The file.
        path: Its name, for the error.
        flag: 'color', or OpenCV's ``IMREAD_REDUCED_COLOR_2``, ``_4`` or ``_8``.
        max_pixels: The most pixels that are allowed; None skips the check.

    Raises:
        CorruptImageError: the file does not decode, is a truncated JPEG, has too many pixels or is a strip of
            ``MAX_ASPECT_RATIO``; or the image is neither grey nor RGB, or its values are not unsigned integers of 8 or
            16 bits.
    """
    if is_truncated_jpeg(content):
        raise CorruptImageError(f'{path} is a truncated JPEG; replace or remove it.')
    by_pillow = _FOR_PILLOW.match(content)
    if by_pillow:
        register_heif()
    if max_pixels is not None:
        check_pixels(content, path, max_pixels)
    try:
        if white := white_level(content, path):
            image = read_16_bit(content, white)
        elif by_pillow:
            image = read_with_pillow(content, path)
        else:
            flag = cv2.IMREAD_COLOR if flag == 'color' else flag
            flag |= cv2.IMREAD_IGNORE_ORIENTATION  # OpenCV does not know that of WebP and 16-bit PNG
            image = mmcv.imfrombytes(content, flag=flag, backend='cv2') if content else None
    except (cv2.error, OSError, MemoryError) as error:
        raise CorruptImageError(f'{path} does not decode ({first_line(error)}); replace or remove it.') from error
    if image is None:
        raise CorruptImageError(f'{path} does not decode as an image; replace or remove it.')
    check_aspect_ratio(image, path)
    return image if by_pillow else upright(image, orientation_of(content))


def check_aspect_ratio(image: np.ndarray, name: str) -> None:
    """Raise a :class:`CorruptImageError` for a strip [H, W, 3], which would fill the memory once it is resized."""
    height, width = image.shape[:2]
    if not height or not width:
        raise CorruptImageError(f'{name} is empty ({width} x {height} pixels); replace or remove it.')
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise CorruptImageError(
            f'{name} is a strip of {width} x {height} pixels; crop it to an aspect ratio of at most {MAX_ASPECT_RATIO}.'
        )


def read_with_pillow(content: bytes, path: str) -> np.ndarray:
    """Decode a GIF (its first frame), JPEG 2000, AVIF or HEIC -> BGR uint8 [H, W, 3].

    Raises:
        CorruptImageError: the file does not decode.
    """
    # Pillow fills a JPEG 2000 up that ends before its end marker, which cannot occur in the data before it.
    if content.rfind(b'\xff\xd9') < content.rfind(b'\xff\x93') and b'\xff\x4f\xff\x51' in content:
        raise CorruptImageError(f'{path} does not decode (it is truncated); replace or remove it.')
    try:
        with open_header(content) as image:
            return from_pil(image, path)
    except CorruptImageError:
        raise
    except Exception as error:  # of any type, as the file may hold anything
        remedy = REMEDIES.get(extension(path), 'replace or remove it')
        raise CorruptImageError(f'{path} does not decode ({first_line(error)}); {remedy}.') from error


@functools.cache
def register_heif() -> None:
    """Let Pillow read HEIC if the package pillow-heif is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def from_pil(image: Image.Image, name: str = 'An image') -> np.ndarray:
    """Convert an image of Pillow -> BGR uint8 [H, W, 3], rotated by its EXIF orientation.

    16-bit values are scaled from [0, 65535] to [0, 255].

    Args:
        image: The image.
        name: What the error calls it.

    Raises:
        CorruptImageError: the image does not decode, or holds 32-bit or floating-point numbers.
    """
    if image.mode in ('I', 'F'):
        raise CorruptImageError(f'{name} of mode {image.mode} has no range of its own; convert it to 8 or 16 bits.')
    try:
        orientation = exif_orientation(image)
        if image.mode.startswith('I;16'):
            return to_8_bits(upright(np.asarray(image), orientation), 65535)
        return upright(np.asarray(image.convert('RGB'))[..., ::-1], orientation)
    except (OSError, ValueError, SyntaxError, MemoryError) as error:  # cut off, closed, or of a mode without colours
        raise CorruptImageError(f'{name} does not decode ({first_line(error)}); replace or remove it.') from error


_GAP = rb'(?:\s|#[^\n]*\n)+'  # with comments
_PNM = re.compile(rb'P[2356]' + _GAP + rb'\d+' + _GAP + rb'\d+' + _GAP + rb'(\d+)\s')
_SAMPLES, _BITS, _SAMPLE_FORMAT, _COLOURS, _KIND = 277, 258, 339, 262, 254  # tags of TIFF
_WHITE_IS_ZERO, _READ = 0, {0, 1, 2, 3, 6}  # of _COLOURS: grey, RGB, a palette, YCbCr; OpenCV gives others falsely
DARK = 1 / 16  # if no value is above this share of white, the camera probably gave fewer than 16 bits


def white_level(content: bytes, path: str) -> int | None:
    """The value of white in an image file of more than 8 bits; None for other files, which OpenCV reads correctly.

    Raises:
        CorruptImageError: the image is neither grey nor RGB, or its values are not unsigned integers of 8 or 16 bits.
    """
    if content[:8] == b'\x89PNG\r\n\x1a\n':
        return 65535 if content[24:25] == b'\x10' else None  # the bit depth in its header
    if content[:4] in (b'II*\0', b'MM\0*'):
        return tiff_white_level(content, path)
    match = _PNM.match(content)
    return int(match[1]) if match and int(match[1]) > 255 else None


def tiff_white_level(content: bytes, path: str) -> int | None:
    """The :func:`white_level` of a TIFF; the errors are the same too."""
    tags = tiff_tags(content)
    if not tags:
        return None  # decoding the image will say what is wrong
    page = tiff_tags(content, tags.next) if tags.next else {}
    if page and not page.get(_KIND, 0):  # no smaller version of the first, and no mask
        warn_pages()
    if tags.get(_COLOURS, 1) not in _READ:
        raise CorruptImageError(
            f'{path} has colours that are neither grey nor RGB, such as CMYK or CIELAB; convert it to RGB.'
        )
    channels, bits, kinds = tags.get(_SAMPLES, 1), max(tags.get(_BITS, (1,))), tags.get(_SAMPLE_FORMAT, (1,))
    if channels not in (1, 3):
        raise CorruptImageError(f'{path} has {channels} channels; give images of one (grey) or three (RGB).')
    if bits > 16 or set(kinds) != {1}:
        raise CorruptImageError(f'{path} does not hold unsigned integers of 8 or 16 bits; convert it to them.')
    return 65535 if bits == 16 else None


def tiff_tags(content: bytes, start: int = 0) -> Mapping[int, Any]:
    """The tags of the first image in a TIFF, or of that whose tags start there; {} if there are none to be read."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
        file = io.BytesIO(content)
        file.seek(start or tags.next)
        tags.load(file)
    except (OSError, SyntaxError, ValueError, struct.error):
        return {}
    return tags


def read_16_bit(content: bytes, white: int) -> np.ndarray | None:
    """Decode an image file of more than 8 bits -> BGR uint8 [H, W, 3], without alpha; None if it does not decode."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is not None and tiff_tags(content).get(_COLOURS) == _WHITE_IS_ZERO:  # OpenCV turns 8 bits alone
        image = white - image
    return None if image is None else to_8_bits(image, white)


def to_8_bits(image: np.ndarray, white: int) -> np.ndarray:
    """Scale unsigned integers [H, W] or [H, W, C] -> BGR uint8 [H, W, 3], linearly from [0, ``white``] to [0, 255].

    ``white`` is that of the file format, not of the image, so a dark image stays darker than a bright one.
    """
    if image.max() < DARK * white:
        warn_dark(white)
    scaled = (image.astype(np.float32) * (255 / white)).round().astype(np.uint8)
    return cv2.cvtColor(scaled, cv2.COLOR_GRAY2BGR) if scaled.ndim == 2 else np.ascontiguousarray(scaled[..., :3])


@functools.cache
def warn_pages() -> None:
    """Warn once that a TIFF may be a stack, of which one slice is read."""
    warn(
        'There are TIFF files of several pages, of which the first alone is read; save each page as a file of its own '
        '(this warning appears once).'
    )


@functools.cache
def warn_dark(white: int) -> None:
    """Warn once that images may have fewer bits than their files."""
    warn(
        f'There are images with no value above {int(DARK * white)} of {white}, nearly black; if the camera gives fewer '
        'bits than the files have, scale the images to the full range (this warning appears once).'
    )
