"""Decoding of JPEG files on the device, as an option."""

from __future__ import annotations

import torch
from mmpretrain.models.utils import SelfSupDataPreprocessor
from mmpretrain.structures import DataSample
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from mmmilan.errors import InputError
from mmmilan.registry import MODELS


@MODELS.register_module()
class DecodingDataPreprocessor(SelfSupDataPreprocessor):
    """mmpretrain's preprocessor for what :class:`LoadEncodedCrop` gives: it decodes, crops, resizes and flips as well.

    On a GPU nvJPEG decodes, through torchvision; on CPU it is libjpeg-turbo. Use it with
    ``collate_fn=dict(type='pseudo_collate')``, as files differ in length. Arguments of ``SelfSupDataPreprocessor``,
    with ``to_rgb=True`` as for images in OpenCV's order of channels.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        """Lists of files, uint8 [length], or images, uint8 [3, H, W], and of their data samples -> normalised batch.

        Raises:
            InputError: if a file does not decode.
        """
        inputs, samples = data['inputs'], data['data_samples']
        encoded = [i for i, image in enumerate(inputs) if image.ndim == 1]
        decoded = self.decode([inputs[i] for i in encoded], [samples[i].img_path for i in encoded])
        cropped = {i: crop_resize_flip(image, samples[i]) for i, image in zip(encoded, decoded, strict=True)}
        images = [cropped[i] if i in cropped else image.to(self.device) for i, image in enumerate(inputs)]
        return super().forward(dict(inputs=torch.stack(images), data_samples=samples), training)

    def decode(self, files: list[Tensor], paths: list[str]) -> list[Tensor]:
        """JPEG files, uint8 [length], as images in BGR, uint8 [3, H, W], on the device."""
        try:
            return [image.flip(0) for image in decode_jpeg(files, ImageReadMode.RGB, self.device)] if files else []
        except RuntimeError:  # which does not say whose fault it is
            for file, path in zip(files, paths, strict=True):
                try:
                    decode_jpeg(file, ImageReadMode.RGB, self.device)
                except RuntimeError as error:
                    raise InputError(f'{path} does not decode as an image ({error}); replace or remove it.') from error
            raise


def crop_resize_flip(image: Tensor, sample: DataSample) -> Tensor:
    """The drawn crop of an image [3, H, W], resized and flipped: [3, *sample.img_shape], uint8."""
    crop = F.resized_crop(image, *sample.crop, sample.img_shape, F.InterpolationMode.BICUBIC, antialias=True)
    return crop.flip(-1) if sample.flip else crop
