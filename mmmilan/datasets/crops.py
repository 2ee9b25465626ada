"""Loading, cropping and flipping for training in one transform, which is faster than three."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmpretrain.datasets.transforms import RandomResizedCrop

from mmmilan.datasets.decoding import MAX_PIXELS, decode, exif_orientation, open_header, read_bytes
from mmmilan.errors import InputError
from mmmilan.registry import TRANSFORMS

# A JPEG decoded at reduced size must have at least this many times the pixels of the output along each axis.
GAP = 2
REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}


@TRANSFORMS.register_module()
class LoadRandomResizedCrop(RandomResizedCrop):
    """Read ``results['img_path']``, crop, resize, flip: ``results['img']``, BGR uint8 [scale, scale, 3].

    Replaces ``LoadImage``, mmpretrain's ``RandomResizedCrop(backend='pillow', interpolation='bicubic')`` and
    ``RandomFlip``; the same random numbers give the same crop and flip. PyTorch resizes with Pillow's antialiased
    bicubic filter, in vectorised integer arithmetic. The crop is drawn from the size in the file's header, so a large
    JPEG can be decoded at 1/2, 1/4 or 1/8 of its size if the crop is then still twice the size of the output (as
    Pillow's ``reducing_gap`` does for thumbnails).

    Args:
        scale: Size of the output, a number or (height, width).
        crop_ratio_range: Area of the crop over that of the image.
        aspect_ratio_range: Width over height of the crop.
        flip_prob: Probability of a horizontal flip.
        backend_args: See :class:`LoadImage`.
        max_pixels: Larger images are treated as corrupt.

    Raises:
        CorruptImageError, InputError: as :class:`LoadImage`.
        InputError: when it is built, if the ranges leave no crop.
    """

    def __init__(
        self,
        scale: int | tuple[int, int],
        crop_ratio_range: tuple[float, float] = (0.08, 1.0),
        aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.0,
        backend_args: dict | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(scale, crop_ratio_range, aspect_ratio_range, interpolation='bicubic')
        if not 0 < min(crop_ratio_range) <= max(crop_ratio_range) <= 1 or min(aspect_ratio_range) <= 0:
            raise InputError(
                f'crop_ratio_range={crop_ratio_range} and aspect_ratio_range={aspect_ratio_range} leave no crop; give '
                'shares of the image from above 0 to 1, and ratios above 0.'
            )
        self.flip_prob = flip_prob
        self.backend_args = backend_args
        self.max_pixels = max_pixels

    def transform(self, results: dict) -> dict:
        path = results['img_path']
        content = read_bytes(path, self.backend_args)
        shape = read_jpeg_shape(content)
        if shape is None or math.prod(shape) > self.max_pixels:
            image = decode(content, path, max_pixels=self.max_pixels)
            shape, factor = image.shape[:2], 1
            box = self.draw_crop(shape)
        else:
            box = self.draw_crop(shape)
            factor = self.reduction(box)
            image = decode(content, path, REDUCED.get(factor, 'color'), max_pixels=None)
        flip = np.random.random_sample() < self.flip_prob
        image = resize(crop(image, box, factor), self.scale, flip)
        results.update(img=image, img_shape=image.shape[:2], ori_shape=shape, flip=flip)
        return results

    def draw_crop(self, shape: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop of an image of this (height, width)."""
        return self.rand_crop_params(np.broadcast_to(np.uint8(0), shape))  # it reads only the shape

    def reduction(self, box: tuple[int, int, int, int]) -> int:
        """The largest factor by which decoding may reduce the image with the crop still ``GAP`` times the output."""
        spare = min(box[2] / self.scale[0], box[3] / self.scale[1]) / GAP
        return next((factor for factor in REDUCED if factor <= spare), 1)


def read_jpeg_shape(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG after its EXIF rotation, without decoding it; None for anything else."""
    if content[:2] != b'\xff\xd8':
        return None
    try:
        with open_header(content) as image:
            return image.size if exif_orientation(image) >= 5 else image.size[::-1]
    except Exception:  # of any type, also from its EXIF
        return None  # decoding the image will say what is wrong


def crop(image: np.ndarray, box: tuple[int, int, int, int], factor: int) -> np.ndarray:
    """Crop an image that was decoded at 1 / ``factor`` of its size.

    Args:
        image: [H, W, 3].
        box: Top, left, height and width, in pixels of the full size.
        factor: The reduction.
    """
    top, left, height, width = (round(side / factor) for side in box)
    return image[top : top + height, left : left + width]


def resize(image: np.ndarray, size: tuple[int, int], flip: bool = False) -> np.ndarray:
    """Resize uint8 [H, W, 3] -> uint8 [*size, 3] by antialiased bicubic interpolation, Pillow's up to rounding.

    The result is stored channel by channel, so that packing it as [3, H, W] copies nothing.
    """
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    tensor = F.interpolate(tensor, size=size, mode='bicubic', antialias=True)[0]
    return (tensor.flip(-1) if flip else tensor).contiguous().permute(1, 2, 0).numpy()
