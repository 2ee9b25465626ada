"""A cache of a teacher's outputs for every image and crop of some epochs, in 8 bits, to train without the teacher.

A crop and its flip are a function of (seed, epoch, image), see :mod:`mmmilan.datasets.reproducible`. A cache stores
only the seed, and they are drawn again. With a cache of E epochs, epoch e of the training has the crops of the cache's
epoch e modulo E. A cache is a folder with ``manifest.json`` and a file ``epoch_e.bin`` for each epoch e, with one
record per image.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmmilan.datasets.image_folder import ImageFolder
from mmmilan.datasets.reproducible import CURRENT, Draw
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS, MODELS
from mmmilan.teachers.by_name import teacher_config

VERSION = 2
COLOUR_TOLERANCE = 2  # of 255: other decoders differ by rounding, other crops or images differ by more


def record_dtype(num_patches: int, feature_dim: int) -> np.dtype:
    """A record: 8-bit features with a scale per token, 8-bit importance, mean colour of the crop, checksum."""
    return np.dtype(
        [
            ('codes', 'i1', (1 + num_patches, feature_dim)),
            ('scales', '<f4', (1 + num_patches,)),
            ('importance', 'u1', (num_patches,)),
            ('importance_scale', '<f4'),
            ('colour', 'u1', (3,)),
            ('checksum', '<u4'),
        ]
    )


def checksum(record: np.void) -> int:
    """CRC-32 of a record without its last four bytes, which hold the checksum."""
    return zlib.crc32(record.tobytes()[:-4])


def encode(images: Tensor, features: Tensor, importance: Tensor) -> np.ndarray:
    """Records [B] of crops [B, 3, H, W], uint8, their features [B, 1 + N, C] and importance [B, N].

    A feature is scale · code, with codes from -127 to 127; the largest feature of a token is exact. The importance of a
    patch is never rounded to zero.
    """
    features, importance = features.float().cpu(), importance.float().cpu()
    scales = features.abs().amax(-1).clamp(min=1e-30) / 127
    importance_scale = importance.amax(-1).clamp(min=1e-30) / 255
    records = np.zeros(len(features), record_dtype(importance.shape[1], features.shape[2]))
    records['codes'] = (features / scales[..., None]).round().numpy()
    records['scales'] = scales
    records['importance'] = (importance / importance_scale[:, None]).round().clamp(min=1).numpy()
    records['importance_scale'] = importance_scale
    records['colour'] = mean_colour(images)
    for record in records:
        record['checksum'] = checksum(record)
    return records


def mean_colour(images: Tensor) -> np.ndarray:
    """Mean colour [..., 3] of images [..., 3, H, W], rounded."""
    return images.float().mean((-2, -1)).round().numpy()


def as_json(value: object) -> object:
    """A config value as JSON stores it: tuples become lists."""
    return json.loads(json.dumps(value))


def checksum_of_names(dataset: ImageFolder) -> int:
    """CRC-32 of the paths of the images relative to their folder, in order."""
    names = [dataset.get_data_info(i)['img_path'].removeprefix(dataset.img_prefix) for i in range(len(dataset))]
    return zlib.crc32('\n'.join(names).encode(errors='surrogateescape'))  # as the system has them


def read_manifest(folder: Path) -> dict:
    """The manifest of the cache in a folder.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    path = folder / 'manifest.json'
    try:
        manifest = dict(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f'{folder} holds no readable manifest.json; make a cache with tools/cache_targets.py.'
        ) from error
    if manifest.get('version') != VERSION:
        raise InputError(f'{folder} is a cache of another version; make it again with tools/cache_targets.py.')
    counts = ('epochs', 'seed', 'images', 'names', 'feature_dim', 'num_patches', 'width', 'patch_size')
    faulty = [name for name in counts if not _are_counts([manifest.get(name)], 1)]
    faulty += [name for name in ('grid', 'input_size') if not _are_counts(manifest.get(name), 2)]
    faulty += [name for name in ('teacher', 'pipeline') if name not in manifest]
    if faulty:
        raise InputError(f'{path} has no {faulty[0]}, or an odd one; make the cache again.')
    return manifest


def _are_counts(values: object, number: int) -> bool:
    return isinstance(values, list) and len(values) == number and all(type(n) is int and 0 <= n < 2**32 for n in values)


class TargetCache:
    """A cache, opened for reading.

    Args:
        folder: The folder that ``tools/cache_targets.py`` wrote.

    Raises:
        InputError: the folder is not a cache, or one of its files is missing or has the wrong size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.epochs, self.seed = self.manifest['epochs'], self.manifest['seed']
        try:
            self.dtype = record_dtype(self.manifest['num_patches'], self.manifest['feature_dim'])
        except ValueError as error:  # numpy's limit
            raise InputError(f'{folder} has records of an impossible size ({error}); make the cache again.') from error
        if not self.epochs:
            raise InputError(f'{folder} holds no complete epoch; run tools/cache_targets.py again.')
        for epoch in range(self.epochs):
            path, size = self.path(epoch), self.dtype.itemsize * self.manifest['images']
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise InputError(f'{path} has {found} bytes instead of {size}; make the cache again.')

    def path(self, epoch: int) -> Path:
        """The file of an epoch."""
        return self.folder / f'epoch_{epoch}.bin'

    def read(self, epoch: int, index: int) -> np.void:
        """The record of an image, of type ``self.dtype``.

        Raises:
            InputError: the record is damaged.
        """
        records = np.fromfile(self.path(epoch), self.dtype, count=1, offset=index * self.dtype.itemsize)
        if not len(records) or checksum(records[0]) != records[0]['checksum']:
            raise InputError(f'Record {index} of {self.path(epoch)} is damaged; make the cache again.')
        return records[0]


@DATASETS.register_module()
class CachedTargets(ImageFolder):
    """Images of a folder with a teacher's cached outputs for their crops, for a head with a :class:`CachedTeacher`.

    Each data sample has ``cached_codes`` [1 + N, C], int8, ``cached_scales`` [1 + N] and ``cached_importance`` [N],
    float32. The sampler must be a ``ReproducibleSampler``, which gives the epoch. The pipeline starts with
    ``results['importance']`` [N] of the crop, so a ``SemanticAwareMasking`` among its steps draws the mask.

    Args:
        data_root: The folder of the images.
        cache: The folder of the cache.
        pipeline: The pipeline that the cache was made with, and maybe a masking before the packing.
        kwargs: Other arguments of :class:`ImageFolder`.

    Raises:
        InputError: the cache is damaged, or was made from other images or with other crops.
    """

    def __init__(self, data_root: str, cache: str, pipeline: Sequence[dict] = (), **kwargs) -> None:
        self.cache, self.importance = TargetCache(cache), None
        super().__init__(data_root=data_root, pipeline=pipeline, **kwargs)
        made_with = self.cache.manifest['pipeline']
        if pixel_steps(as_json(pipeline)) != pixel_steps(made_with):
            raise InputError(
                f'The cache {cache} was made with the pipeline {json.dumps(made_with)}, which is not that of the data '
                'set; make them equal, or make the cache again.'
            )
        if len(self) != self.cache.manifest['images'] or checksum_of_names(self) != self.cache.manifest['names']:
            raise InputError(
                f'The cache {cache} was made of {self.cache.manifest["images"]} images, not of the {len(self)} in '
                f'{data_root}; set data_root to the folder that it was made of, or make the cache again.'
            )

    def __getitem__(self, index: int) -> dict:
        """A sample with the cache's crop and its targets.

        Raises:
            InputError: the sampler is not a ``ReproducibleSampler``, or the image or its record has changed.
        """
        draw = index if isinstance(index, Draw) else CURRENT.get()  # a wrapper may have changed the index
        if draw is None:
            raise InputError(
                'CachedTargets has to know the epoch; set train_dataloader.sampler.type=mmmilan.ReproducibleSampler.'
            )
        epoch = draw.epoch % self.cache.epochs
        record = self.cache.read(epoch, int(index))
        importance = self.importance = record['importance'] * record['importance_scale']
        sample = super().__getitem__(Draw(self.cache.seed, epoch, index))
        difference = np.abs(mean_colour(sample['inputs']) - record['colour'].astype(float)).max()
        if difference > COLOUR_TOLERANCE:
            raise InputError(
                f'{self.get_data_info(int(index))["img_path"]} has changed since {self.cache.folder} was made; '
                'restore the image, or make the cache again.'
            )
        for name, value in dict(codes=record['codes'], scales=record['scales'], importance=importance).items():
            sample['data_samples'].set_field(torch.from_numpy(np.array(value)), f'cached_{name}')
        return sample

    def get_data_info(self, idx: int) -> dict:
        """What the pipeline starts with."""
        info = super().get_data_info(idx)
        return info if self.importance is None else info | dict(importance=self.importance)


def pixel_steps(pipeline: list[dict]) -> list[dict]:
    """The steps of a pipeline without those that draw masks and pack samples, which change no pixel."""
    return [step for step in pipeline if not str(step['type']).endswith(('Masking', 'PackInputs'))]


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
        self.output: tuple[Tensor, Tensor] | None = None
        self.register_buffer('place', torch.empty(0), persistent=False)  # knows the model's device

    @contextmanager
    def giving(self, data_samples: list[DataSample] | None) -> Iterator[None]:
        """Give, in this context, what came with the images, features [B, 1 + N, C] and importance [B, N], float32.

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
        self.output = codes * scales[..., None], importance
        try:
            yield
        finally:
            self.output = None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher gave of these images, see :meth:`giving`.

        Raises:
            InputError: the images are not those of a context.
        """
        if self.output is None:
            raise InputError(
                f'The cache {self.folder} knows only the images that come with its targets; train on them with '
                'model.type=mmmilan.CachedMILAN, or give the head the teacher itself.'
            )
        return self.output

    def text_tower(self) -> NoReturn:
        """There is none.

        Raises:
            InputError: always.
        """
        raise InputError(f'The cache {self.folder} has no text tower; give the head the teacher itself.')
