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
        samples = data['data_samples']
        encoded = [i for i, image in enumerate(data['inputs']) if image.ndim == 1]
        images = dict(zip(encoded, self.decode([data['inputs'][i] for i in encoded], samples), strict=True))
        inputs = [
            cut(images[i], samples[i]) if i in images else image.to(self.device)
            for i, image in enumerate(data['inputs'])
        ]
        return super().forward(dict(inputs=torch.stack(inputs), data_samples=samples), training)

    def decode(self, files: list[Tensor], samples: list[DataSample]) -> list[Tensor]:
        """JPEG files, uint8 [length], as images in BGR, uint8 [3, H, W], on the device."""
        if not files:
            return []
        try:
            images = decode_jpeg(files, ImageReadMode.RGB, self.device)
        except RuntimeError as error:
            names = ', '.join(sample.img_path for sample in samples)
            raise InputError(f'One of these images does not decode ({error}); replace or remove it: {names}') from error
        return [image.flip(0) for image in images]


def cut(image: Tensor, sample: DataSample) -> Tensor:
    """The drawn crop of an image [3, H, W], resized and flipped: [3, *sample.img_shape], uint8."""
    crop = F.resized_crop(image, *sample.crop, sample.img_shape, F.InterpolationMode.BICUBIC, antialias=True)
    return crop.flip(-1) if sample.flip else crop
