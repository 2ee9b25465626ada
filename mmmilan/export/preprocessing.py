"""The preprocessing of images for evaluation, in the configs of other libraries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.utils import to_2tuple
from torch import Tensor, nn

from mmmilan.checkpoints.task_config import test_dataset
from mmmilan.components import type_name
from mmmilan.errors import InputError

# Pillow's numbers. Only OpenCV has 'area'; the antialiased bilinear filter of the others averages pixels too.
_INTERPOLATION = {'nearest': 0, 'bilinear': 2, 'bicubic': 3, 'area': 2}
# Steps of a test pipeline that leave the pixels as they are.
READING = ('LoadImage', 'LoadImageFromFile', 'LoadAnnotations', 'LoadLabelMap', 'PackInputs', 'PackSegInputs')


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise.

    Attributes:
        resize: short side of the image in pixels before the crop; None if the image is not cropped but resized to
            ``size``, whatever its aspect ratio.
        size: height and width of the encoder's input.
        interpolation: 'bicubic', 'bilinear', 'nearest' or 'area'.
        mean: mean of RGB images in [0, 1].
        std: standard deviation of RGB images in [0, 1].
        library: what resizes: 'pillow', which averages where images become smaller, or 'cv2', which does not.
    """

    resize: int | None
    size: tuple[int, int]
    interpolation: str
    mean: list[float]
    std: list[float]
    library: str = 'pillow'

    @property
    def filter(self) -> str:
        """The interpolation in the words of timm and open_clip."""
        return 'bilinear' if self.interpolation == 'area' else self.interpolation

    def timm(self) -> dict[str, Any]:
        """The entries of timm's ``pretrained_cfg``.

        Raises:
            InputError: the crop is not square; timm then resizes the image to cover the crop, not by its short side.
        """
        settings = dict(interpolation=self.filter, mean=self.mean, std=self.std, input_size=[3, *self.size])
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
            InputError: the short side is cropped too, the crop is not square, or the interpolation is 'nearest', none
                of which open_clip supports.
        """
        if self.interpolation == 'nearest':
            raise InputError("open_clip has no interpolation 'nearest'; give the test pipeline 'bicubic'.")
        settings = dict(mean=self.mean, std=self.std, interpolation=self.filter)
        if self.resize is None:
            return settings | dict(resize_mode='squash')
        self.check_square('open_clip')
        if self.resize != self.size[0]:
            raise InputError(
                f'open_clip resizes the short side to {self.size[0]} pixels before it crops, and the test pipeline to '
                f'{self.resize}; set the scale of ResizeEdge to {self.size[0]}.'
            )
        return settings | dict(resize_mode='shortest')

    def in_words(self) -> dict[str, Any]:
        """As JSON, for other programs."""
        size = list(self.size)
        sides = dict(size=size, crop=None) if self.resize is None else dict(short_edge=self.resize, crop=size)
        return sides | dict(interpolation=self.interpolation, library=self.library)

    def check_square(self, library: str) -> None:
        """Raise an :class:`InputError` if the crop is not square."""
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
    """The preprocessing by the test pipeline of a config and the data preprocessor of a model.

    Raises:
        InputError: the pipeline does something for which other libraries have no setting, or its output is not of
            the encoder's input size.
    """
    if not takes_rgb(model):
        raise InputError(
            'The model takes BGR images (data_preprocessor.to_rgb=False), and other libraries give it RGB; publish one '
            'that takes RGB.'
        )
    steps = {type_name(step): step for step in test_dataset(config)['pipeline']}
    resizing = {name: step for name, step in steps.items() if name not in READING}
    resize: int | None = None
    step = resizing.get('ResizeEdge') or resizing.get('Resize') or {}
    if [*resizing] == ['ResizeEdge', 'CenterCrop'] and step.get('edge', 'short') == 'short':
        size, resize = resizing['CenterCrop']['crop_size'], step['scale']
    elif [*resizing] == ['Resize'] and 'scale' in step and not step.get('keep_ratio'):
        size = step['scale']
        size = size[::-1] if isinstance(size, (tuple, list)) else size  # OpenMMLab's is width, height
    else:
        raise InputError(
            f'Other libraries cannot prepare images as the test pipeline does ({", ".join(steps)}); use ResizeEdge '
            '(short edge) and CenterCrop, or Resize.'
        )
    size = tuple(to_2tuple(size))
    img_size = tuple(getattr(model.backbone, 'img_size', size))  # of a ViT; other encoders take any
    if size != img_size:
        raise InputError(f'The test pipeline gives images of {size} but img_size={img_size}; make them equal.')
    interpolation = step.get('interpolation', 'bilinear')
    if interpolation not in _INTERPOLATION:
        raise InputError(
            f'Other libraries do not have the interpolation {interpolation!r} of the test pipeline; choose one of '
            f'{", ".join(_INTERPOLATION)}.'
        )
    return Preprocessing(resize, size, interpolation, *normalisation(model), step.get('backend') or 'cv2')


def takes_rgb(model: nn.Module) -> bool:
    """Whether the data preprocessor of a model turns the BGR images of the pipeline to RGB."""
    preprocessor = model.data_preprocessor  # mmpretrain's, mmdet's and mmseg's
    return bool(getattr(preprocessor, 'to_rgb', False) or getattr(preprocessor, '_channel_conversion', False))


def normalisation(model: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, of RGB images in [0, 1], that the data preprocessor of a model takes out."""
    order = 1 if takes_rgb(model) else -1
    return tuple([round(value, 6) for value in each.flatten().tolist()[::order]] for each in mean_and_std(model))


def mean_and_std(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The same as tensors [3, 1, 1]; a data preprocessor that does not normalise leaves values from 0 to 255."""
    mean = getattr(model.data_preprocessor, 'mean', torch.zeros(3, 1, 1))
    std = getattr(model.data_preprocessor, 'std', torch.ones(3, 1, 1))
    return mean / 255, std / 255
