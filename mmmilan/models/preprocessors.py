"""From batches of the data loader to normalised images on the device, without waiting for it.

mmpretrain's preprocessors stop the host in every step: they reverse the channels by a list of indices, which is copied
to the device, and copy labels one by one from memory that is not pinned.
"""

from __future__ import annotations

import torch
from mmpretrain.models.utils import ClsDataPreprocessor, SelfSupDataPreprocessor
from mmpretrain.structures import DataSample
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.models.maskclip_losses import count_words
from mmmilan.registry import MODELS


def check_inputs(data: dict) -> None:
    """Raise an :class:`InputError` if a batch has no images."""
    if 'inputs' not in data:
        raise InputError(f'A batch has no inputs but {", ".join(data)}; let the data pipeline end with PackInputs.')


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
        check_inputs(data)
        if not isinstance(data['inputs'], Tensor):
            raise InputError(
                'The images of a batch are a list, not a tensor; set collate_fn of the data loader to '
                "dict(type='default_collate'), and give all images one size."
            )
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
        check_inputs(data)
        samples = data.get('data_samples')
        for name in ('gt_label', 'gt_score'):
            if samples and name in samples[0]:
                copy_field(samples, name, self.device)
        with self.device:
            return super().forward(data, training)
