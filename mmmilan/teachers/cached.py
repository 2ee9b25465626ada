"""A teacher that is not run: its features and importances were computed before and come with the images."""

from __future__ import annotations

import json
from typing import NoReturn

import torch
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmmilan.datasets.target_cache import TargetCache, as_json
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mmmilan.teachers.by_name import teacher_config


@MODELS.register_module()
class CachedTeacher(nn.Module):
    """Stands for a teacher in training on :class:`CachedTargets`: no weights, no forward pass.

    Args:
        cache: The folder that ``tools/cache_targets.py`` wrote.
        of: Config or name of the teacher that the cache must come from; None accepts any.

    Attributes:
        feature_dim: Width C of the features in the cache.
        width, patch_size, input_size, grid, num_patches: As of the teacher that made them.

    Raises:
        InputError: the cache is damaged, or of another teacher.
    """

    def __init__(self, cache: str, of: dict | str | None = None) -> None:
        super().__init__()
        self.folder = cache
        manifest = TargetCache(cache).manifest
        if of is not None and as_json(teacher_config(of)) != manifest['teacher']:
            raise InputError(
                f'The cache {cache} comes from the teacher {json.dumps(manifest["teacher"])}, and head.teacher.of '
                'names another; make them equal, or make the cache again.'
            )
        self.feature_dim = manifest['feature_dim']
        self.num_patches = manifest['num_patches']
        self.width = manifest['width']
        self.patch_size = manifest['patch_size']
        self.grid = tuple(manifest['grid'])
        self.input_size = tuple(manifest['input_size'])

        self.register_buffer('place', torch.empty(0), persistent=False)  # knows the model's device

    def read(self, data_samples: list[DataSample] | None) -> tuple[Tensor, Tensor]:
        """What came with the images: features [B, 1 + N, C] and importance [B, N], float32, on the model's device.

        Raises:
            InputError: nothing came.
        """
        if not data_samples or 'cached_codes' not in data_samples[0]:
            raise InputError(
                f'The images come without the targets of {self.folder}; set train_dataloader.dataset.type='
                'mmmilan.CachedTargets, with cache= the same folder.'
            )
        codes, scales, importance = (
            torch.stack([sample.get(f'cached_{name}') for sample in data_samples])
            for name in ('codes', 'scales', 'importance')
        )
        codes, scales, importance = (x.to(self.place.device, non_blocking=True) for x in (codes, scales, importance))
        return codes * scales[..., None], importance

    def forward(self, images: Tensor) -> NoReturn:
        """There is nothing to run.

        Raises:
            InputError: always.
        """
        raise InputError(f'The cache {self.folder} knows no other images; give the head the teacher itself.')

    def text_tower(self) -> NoReturn:
        """There is none.

        Raises:
            InputError: always.
        """
        raise InputError(f'The cache {self.folder} has no text tower; give the head the teacher itself.')
