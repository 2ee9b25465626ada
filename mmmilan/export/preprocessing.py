"""How a config prepares images for evaluation, in the terms of other libraries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from torch import nn

from mmmilan.errors import InputError

_INTERPOLATION = {'nearest': 0, 'bilinear': 2, 'bicubic': 3}  # Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise.

    Attributes:
        resize: the length in pixels of the short side before the crop; None if the image is resized to ``size``
            whatever its proportions.
        size: height and width of what the encoder sees.
        interpolation: 'bicubic', 'bilinear' or 'nearest'.
        mean: of images in [0, 1], RGB.
        std: likewise.
    """

    resize: int | None
    size: tuple[int, int]
    interpolation: str
    mean: list[float]
    std: list[float]

    def timm(self) -> dict[str, Any]:
        """The entries of timm's ``pretrained_cfg``.

        Raises:
            InputError: a rectangle is cropped; timm then resizes the image to cover it, and not to a short side.
        """
        settings = dict(interpolation=self.interpolation, mean=self.mean, std=self.std, input_size=[3, *self.size])
        if self.resize is None:
            return settings | dict(crop_pct=1.0, crop_mode='squash')
        self.check_square('timm')
        share = self.size[0] / self.resize
        if math.floor(self.size[0] / share) != self.resize:  # timm divides, and rounds down
            share = self.size[0] / (self.resize + 0.5)
        return settings | dict(crop_pct=share, crop_mode='center')

    def open_clip(self) -> dict[str, Any]:
        """The entries of open_clip's ``preprocess_cfg``.

        Raises:
            InputError: more than the long side is cropped, or a rectangle, or pixels are copied ('nearest'); open_clip
                does none of it.
        """
        if self.interpolation == 'nearest':
            raise InputError("open_clip has no interpolation 'nearest'; give the test pipeline 'bicubic'.")
        settings = dict(mean=self.mean, std=self.std, interpolation=self.interpolation)
        if self.resize is None:
            return settings | dict(resize_mode='squash')
        self.check_square('open_clip')
        if self.resize != self.size[0]:
            raise InputError(
                f'open_clip resizes the short side to {self.size[0]} pixels before it crops, and the test pipeline to '
                f'{self.resize}; set the scale of ResizeEdge to {self.size[0]}.'
            )
        return settings | dict(resize_mode='shortest')

    def check_square(self, library: str) -> None:
        """Raise an :class:`InputError` where the crop is a rectangle."""
        if self.size[0] != self.size[1]:
            raise InputError(
                f'{library} cannot be told to resize the short side and crop {self.size[0]} x {self.size[1]} pixels; '
                'give the test pipeline Resize in place of ResizeEdge and CenterCrop.'
            )

    def transformers(self) -> dict[str, Any]:
        """The entries of transformers' ``preprocessor_config.json``."""
        height, width = self.size
        settings = dict(
            do_resize=True,
            resample=_INTERPOLATION[self.interpolation],
            do_rescale=True,
            rescale_factor=1 / 255,
            do_normalize=True,
            image_mean=self.mean,
            image_std=self.std,
        )
        if self.resize is None:
            return settings | dict(image_processor_type='ViTImageProcessor', size=dict(height=height, width=width))
        return settings | dict(
            image_processor_type='CLIPImageProcessor',
            size=dict(shortest_edge=self.resize),
            do_center_crop=True,
            crop_size=dict(height=height, width=width),
        )


def read_preprocessing(config: Config, model: nn.Module) -> Preprocessing:
    """What the test pipeline and the data preprocessor of a model do.

    Raises:
        InputError: the pipeline does something that other libraries cannot be told, or its size is not the encoder's.
    """
    steps = {}
    for step in config.test_dataloader.dataset.pipeline:
        steps[step['type'].rpartition('.')[2]] = step
    resize: int | None = None
    if 'ResizeEdge' in steps and 'CenterCrop' in steps and steps['ResizeEdge'].get('edge', 'short') == 'short':
        step, size, resize = steps['ResizeEdge'], steps['CenterCrop']['crop_size'], steps['ResizeEdge']['scale']
    elif 'Resize' in steps and not steps['Resize'].get('keep_ratio'):
        step, size = steps['Resize'], steps['Resize']['scale']
        size = size[::-1] if isinstance(size, (tuple, list)) else size  # OpenMMLab's is width, height
    else:
        raise InputError(
            f'The test pipeline ({", ".join(steps)}) cannot be told to other libraries; use ResizeEdge (short edge) '
            'and CenterCrop, or Resize.'
        )
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if size != tuple(model.backbone.img_size):
        raise InputError(
            f'The test pipeline gives images of {size} but img_size={tuple(model.backbone.img_size)}; make them equal.'
        )
    interpolation = step.get('interpolation', 'bilinear')
    if interpolation == 'area':  # OpenCV's alone; the antialiased bilinear filter of the others averages pixels too
        interpolation = 'bilinear'
    if interpolation not in _INTERPOLATION:
        raise InputError(
            f'The interpolation {interpolation!r} of the test pipeline cannot be told to other libraries; choose one '
            f'of {", ".join(_INTERPOLATION)}.'
        )
    normalisation = model.data_preprocessor
    mean, std = (
        [round(value / 255, 6) for value in each.flatten().tolist()] for each in (normalisation.mean, normalisation.std)
    )
    return Preprocessing(resize, size, interpolation, mean, std)
