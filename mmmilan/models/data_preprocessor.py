"""From batches of the data loader to normalised images on the device, without waiting for it.

mmpretrain's preprocessors stop the host in every step: they reverse the channels by a list of indices, which is copied
to the device, and copy labels one by one from memory that is not pinned.
"""

from __future__ import annotations

import torch
from mmpretrain.models.utils import ClsDataPreprocessor, SelfSupDataPreprocessor
from mmpretrain.structures import DataSample
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from mmmilan.errors import InputError
from mmmilan.models.language import count_words
from mmmilan.registry import MODELS


def copy_field(samples: list[DataSample], name: str, device: torch.device) -> None:
    """Copy a field of all samples, tensors of the same shape, to the device: in one piece, without waiting for it."""
    values = torch.stack([sample.get(name) for sample in samples])
    if device.type == 'cuda' and values.device.type == 'cpu':
        values = values.pin_memory()
    for sample, value in zip(samples, values.to(device, non_blocking=True), strict=True):
        sample.set_field(value, name)


@MODELS.register_module()
class PretrainingDataPreprocessor(SelfSupDataPreprocessor):
    """mmpretrain's ``SelfSupDataPreprocessor``, which does not wait for the device. Same arguments and results.

    Of the data samples, ``text`` [L] and ``gt_label`` go to the device. A mask stays on the CPU, where it is checked.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        """Images [B, 3, H, W], uint8, and data samples -> normalised images, float32, and samples on the device."""
        images = data['inputs'].to(self.device, non_blocking=True)
        images = (images.flip(1) if self._channel_conversion else images).float()
        if self._enable_normalize:
            images = (images - self.mean) / self.std
        samples = data.get('data_samples')
        for name in ('text', 'gt_label'):
            if samples and name in samples[0] and len({sample.get(name).shape for sample in samples}) == 1:
                copy_field(samples, name, self.device)
        return dict(inputs=images, data_samples=samples)


@MODELS.register_module()
class CaptionDataPreprocessor(PretrainingDataPreprocessor):
    """:class:`PretrainingDataPreprocessor` for :class:`MaskCLIP`: it counts words while the host can still see them.

    ``data_sample.num_words`` tells masked language modelling how many words it will mask in all, which it would have to
    ask the device for. Same arguments.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        samples = data.get('data_samples')
        if training and samples and samples[0].text.device.type == 'cpu':
            counts = count_words(torch.stack([sample.text for sample in samples])).tolist()
            for sample, count in zip(samples, counts, strict=True):
                sample.set_field(count, 'num_words', field_type='metainfo')
        return super().forward(data, training)


@MODELS.register_module()
class ClassificationDataPreprocessor(ClsDataPreprocessor):
    """mmpretrain's ``ClsDataPreprocessor``, which does not wait for the device. Same arguments and results.

    The random permutations of Mixup and CutMix are drawn on the device.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._non_blocking = True

    def forward(self, data: dict, training: bool = False) -> dict:
        """Images [B, 3, H, W], uint8, and data samples -> normalised images, float32, and samples on the device."""
        samples = data.get('data_samples')
        for name in ('gt_label', 'gt_score'):
            if samples and name in samples[0]:
                copy_field(samples, name, self.device)
        with self.device:
            return super().forward(data, training)


@MODELS.register_module()
class DecodingDataPreprocessor(PretrainingDataPreprocessor):
    """For what :class:`LoadEncodedCrop` gives: it decodes, crops, resizes and flips as well. Experimental.

    On a GPU nvJPEG decodes, through torchvision; on CPU it is libjpeg-turbo. It crops image by image on the main
    thread, and is probably slower than 12 cores. Use it with ``collate_fn=dict(type='pseudo_collate')``, as files
    differ in length. Arguments of ``SelfSupDataPreprocessor``, with ``to_rgb=True`` as for images in OpenCV's order of
    channels.
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
