"""16-bit images, which OpenCV reads too dark, and other than one or three channels, of which it reads only a part."""

from __future__ import annotations

import functools
import io
import logging
import re
import struct

import cv2
import numpy as np
from mmengine.logging import print_log
from PIL import TiffImagePlugin

from mmmilan.errors import CorruptImageError

_PNM = re.compile(rb'P[2356](?:\s+|\s*#[^\n]*\n)\s*\d+\s+\d+\s+(\d+)\s')
_SAMPLES, _BITS, _SAMPLE_FORMAT = 277, 258, 339  # tags of TIFF
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
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
        file = io.BytesIO(content)
        file.seek(tags.next)
        tags.load(file)
    except (OSError, SyntaxError, ValueError, struct.error):
        return None  # decoding the image will say what is wrong
    channels, bits, kinds = tags.get(_SAMPLES, 1), max(tags.get(_BITS, (1,))), tags.get(_SAMPLE_FORMAT, (1,))
    if channels not in (1, 3):
        raise CorruptImageError(f'{path} has {channels} channels; give images of one (grey) or three (RGB).')
    if bits > 16 or set(kinds) != {1}:
        raise CorruptImageError(f'{path} does not hold unsigned integers of 8 or 16 bits; convert it to them.')
    return 65535 if bits == 16 else None


def read_16_bit(content: bytes, white: int) -> np.ndarray | None:
    """Decode an image file of more than 8 bits -> BGR uint8 [H, W, 3], without alpha; None if it does not decode."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
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
def warn_dark(white: int) -> None:
    """Warn once that images may have fewer bits than their files."""
    print_log(
        f'There are images with no value above {int(DARK * white)} of {white}, nearly black; if the camera gives fewer '
        'bits than the files have, scale the images to the full range (this warning appears once).',
        logger='current',
        level=logging.WARNING,
    )
