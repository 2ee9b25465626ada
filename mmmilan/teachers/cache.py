"""What a teacher gives of the crops of some images, kept in 8 bits (docs/efficiency.md).

A cache is a folder with ``manifest.json``, which says of which teacher and which crops it is, and ``records.bin``, with
a record for each crop of each image. A crop and its flip are a function of (seed, crop, image), see
:mod:`mmmilan.datasets.reproducible`: they are drawn again and not stored. Several processes may read and write at once.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from torch import Tensor, nn

from mmmilan.components import type_name
from mmmilan.datasets.image_folder import ImageFolder
from mmmilan.datasets.reproducible import CURRENT
from mmmilan.errors import InputError, warn
from mmmilan.files import check_output_folder, make_folder, write_text
from mmmilan.registry import TRANSFORMS
from mmmilan.teachers.by_name import teacher_config

VERSION = 3
MANIFEST, RECORDS = 'manifest.json', 'records.bin'
TOLERANCE = 2  # of 255: other decoders differ by rounding, other crops or images differ by more
SIDE = 4  # of a thumbnail
MASKING = ('LoadImportance', 'Masking')  # the steps of a pipeline that draw masks


def record_dtype(num_patches: int, feature_dim: int) -> np.dtype:
    """A record: 8-bit features with a scale per token, 8-bit importance, a thumbnail of the crop, checksum."""
    return np.dtype(
        [
            ('codes', 'i1', (1 + num_patches, feature_dim)),
            ('scales', '<f4', (1 + num_patches,)),
            ('importance', 'u1', (num_patches,)),
            ('importance_scale', '<f4'),
            ('thumbnail', 'u1', (3, SIDE, SIDE)),
            ('checksum', '<u4'),
        ]
    )


def checksum(record: np.void) -> int:
    """CRC-32 of a record without its last four bytes, which hold the checksum; 1 in place of 0, which is no record."""
    return zlib.crc32(record.tobytes()[:-4]) or 1


def encode(images: Tensor, features: Tensor, importance: Tensor) -> np.ndarray:
    """Records [B] of crops [B, 3, H, W], uint8, their features [B, 1 + N, C] and importance [B, N].

    A feature is scale · code, with codes from -127 to 127. The importance of a patch is not rounded to zero.
    """
    features, importance = features.float(), importance.float()
    scales = features.abs().amax(-1).clamp(min=1e-30) / 127
    importance_scale = importance.amax(-1).clamp(min=1e-30) / 255
    parts = dict(codes=(features / scales[..., None]).round().to(torch.int8), scales=scales)
    codes = (importance / importance_scale[:, None]).round().clamp(min=1)
    parts['importance'] = (codes * (importance > 0)).to(torch.uint8)
    parts['importance_scale'] = importance_scale
    records = np.zeros(len(features), record_dtype(importance.shape[1], features.shape[2]))
    for name, part in parts.items():
        records[name] = part.cpu().numpy()
    records['thumbnail'] = thumbnails(images).round()
    for record in records:
        record['checksum'] = checksum(record)
    return records


def decode(records: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Records [B] -> features [B, 1 + N, C] and importance [B, N], float32, on a device."""
    codes, scales, importance = (
        torch.from_numpy(part.copy()).to(device, non_blocking=True)  # the fields of records are not aligned
        for part in (records['codes'], records['scales'], importance_of(records))
    )
    return codes.float().mul_(scales[..., None]), importance


def importance_of(records: np.ndarray) -> np.ndarray:
    """The importance [..., N], float32, in records [...]."""
    return records['importance'] * records['importance_scale'][..., None]


def thumbnails(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W], uint8, of 4 x 4 pixels, by some pixels of large ones: [B, 3, 4, 4], float32."""
    step = max(1, images.shape[-1] // 56)
    return F.adaptive_avg_pool2d(images[..., ::step, ::step].float(), SIDE).numpy()


def describe(
    config: Config, teacher: nn.Module, dataset: ImageFolder, seed: int, num_patches: int, feature_dim: int
) -> dict:
    """The manifest of a training's cache: what the output of its teacher depends on, and the size of it.

    Args:
        config: The config of the training, which has ``model.head.teacher``.
        teacher: The teacher.
        dataset: The images.
        seed: Of their crops.
        num_patches: Number N of patches.
        feature_dim: Width C of the features.
    """
    model, loader = config.model.to_dict(), config.train_dataloader.to_dict()
    names = [dataset.get_data_info(i)['img_path'].removeprefix(dataset.img_prefix) for i in range(len(dataset))]
    manifest = dict(
        version=VERSION,
        teacher={key: value for key, value in teacher_config(model['head']['teacher']).items() if key != 'pretrained'},
        weights=checksum_of_weights(teacher),
        head=model['head']['type'],
        data_preprocessor=model.get('data_preprocessor'),
        pipeline=pixel_steps(loader['dataset']['pipeline']),
        seed=seed,
        images=len(names),
        names=zlib.crc32('\n'.join(names).encode(errors='surrogateescape')),  # as the system has them
        num_patches=num_patches,
        feature_dim=feature_dim,
    )
    return json.loads(json.dumps(manifest, default=str))  # as it will be read: tuples become lists, classes names


def checksum_of_weights(module: nn.Module) -> int:
    """CRC-32 of weights in 16 bits, the same whether they are held in 16 bits or 32."""
    total = 0
    for tensor in module.state_dict().values():
        total = zlib.crc32(tensor.detach().half().flatten().cpu().numpy(), total)
    return total


def pixel_steps(pipeline: list[dict]) -> list[dict]:
    """The steps of a pipeline without those that draw masks and pack samples, which change no pixel."""
    return [step for step in pipeline if not type_name(step).endswith((*MASKING, 'PackInputs'))]


def read_manifest(folder: Path) -> dict:
    """The manifest of the cache in a folder.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = dict(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f'{folder} holds no readable {MANIFEST}; make a cache with tools/cache_targets.py.') from error
    if manifest.get('version') != VERSION:
        raise InputError(f'{folder} is a cache of another version; make it again with tools/cache_targets.py.')
    sizes = [manifest.get(name) for name in ('images', 'num_patches', 'feature_dim')]
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise InputError(f'{path} lacks the number of images, patches or features; make the cache again.')
    return manifest


def make_cache(folder: Path, manifest: dict) -> None:
    """Begin a cache, or go on with one; several processes may do so.

    Raises:
        InputError: the folder holds another cache or other files.
    """
    taken = os.path.lexists(folder / RECORDS)  # asked first: another process writes the manifest before the records
    if not os.path.lexists(folder / MANIFEST):
        check_output_folder(folder, [RECORDS] if taken else [])
        make_folder(folder)
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + '\n')
    if other := differences(folder, manifest):
        raise InputError(f'{folder} holds a cache of another {", ".join(other)}; choose another folder.')


def differences(folder: Path, manifest: dict) -> list[str]:
    """The names of what a cache in a folder does not share with the one that a manifest describes.

    Raises:
        InputError: see :func:`read_manifest`.
    """
    found = read_manifest(folder)
    return [key for key in manifest if found.get(key) != manifest[key]]


def remove_cache(folder: Path) -> bool:
    """Remove a cache, and its folder if nothing else is in it; whether there was one."""
    if not os.path.lexists(folder / MANIFEST):
        return False
    for name in (RECORDS, MANIFEST):  # several processes may do so
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
    return True


class TeacherCache:
    """A cache, opened for reading and writing.

    Args:
        folder: The folder, see :func:`make_cache`.

    Attributes:
        dtype: Of a record.
        num_images: Number M of images.

    Raises:
        InputError: the folder is no cache, or cannot be used.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.num_images = manifest['images']
        self.is_writable = os.access(self.folder, os.W_OK)
        flags = os.O_RDWR | os.O_CREAT if self.is_writable else os.O_RDONLY
        try:
            self.dtype = record_dtype(manifest['num_patches'], manifest['feature_dim'])
            self.file = os.open(self.folder / RECORDS, flags, 0o666)
        except (OSError, ValueError) as error:  # numpy's limit of a record
            raise InputError(
                f'The cache {folder} cannot be used ({error}); make it again in another folder.'
            ) from error
        self.whole = defaultdict(partial(np.zeros, self.num_images, bool))  # records by crop, whose checksum is right
        self.has_warned = False

    def __del__(self) -> None:
        if hasattr(self, 'file'):
            os.close(self.file)

    def __reduce__(self) -> tuple:
        return TeacherCache, (self.folder,)  # to a data worker

    def place(self, crop: int, image: int = 0) -> int:
        """Where a record begins, in bytes; of the first image, how much the crops before take."""
        return (crop * self.num_images + image) * self.dtype.itemsize

    def load(self, crop: int, images: Sequence[int]) -> np.ndarray:
        """The records [B] of a crop of some images; zeros where there is none, or it is damaged."""
        records = np.zeros(len(images), self.dtype)
        rows = records.view(np.uint8).reshape(len(images), self.dtype.itemsize)
        for row, record, image in zip(rows, records, images, strict=True):
            size = os.preadv(self.file, [row], self.place(crop, image))
            if not self.whole[crop][image]:
                self.whole[crop][image] = size == len(row) and record['checksum'] == checksum(record)
            if not self.whole[crop][image]:
                row[:] = 0
        return records

    def read(self, crop: int, images: Sequence[int], pixels: Tensor) -> np.ndarray:
        """The records of a crop of some images.

        Args:
            crop: Number of the crop.
            images: Their numbers, [B].
            pixels: These crops [B, 3, H, W], uint8.

        Returns:
            Records [B]; zeros where there is none, it is damaged, or of other pixels, of which the log has the first.
        """
        records = self.load(crop, images)
        difference = np.abs(thumbnails(pixels) - records['thumbnail']).max((1, 2, 3))
        other = (difference > TOLERANCE) & (records['checksum'] > 0)
        if other.any() and not self.has_warned:
            self.has_warned = True
            warn(
                f'Crop {crop} of image {images[other.argmax()]} has other pixels than in {self.folder}: the image has '
                'changed, or the pipeline does not give the same crops again.'
            )
        records[other] = np.zeros((), self.dtype)
        return records

    def write(self, crop: int, images: Sequence[int], records: np.ndarray) -> None:
        """Write the records [B] of a crop of some images, unless the folder may only be read.

        Raises:
            InputError: the disk is full.
        """
        for image, record in zip(images, records, strict=True) if self.is_writable else ():
            try:
                os.pwrite(self.file, record.tobytes(), self.place(crop, image))
            except OSError as error:
                raise InputError(
                    f'{self.folder / RECORDS} cannot be written ({error.strerror}); free some space, or choose another '
                    'folder.'
                ) from error


@TRANSFORMS.register_module()
class LoadImportance(BaseTransform):
    """``results['importance']`` [N], float32, of the crop from a complete cache, for a masking in a data pipeline.

    The crops must come by a ``ReproducibleSampler`` with ``crops``.

    Args:
        cache: The folder that ``tools/cache_targets.py`` wrote.

    Raises:
        InputError: the folder is no cache.
    """

    def __init__(self, cache: str) -> None:
        self.folder = cache
        TeacherCache(cache)

    @cached_property
    def cache(self) -> TeacherCache:
        """Opened in each data worker."""
        return TeacherCache(self.folder)

    def transform(self, results: dict) -> dict:
        """Add the importance of the crop; of an image that stands in for one that does not decode, a uniform one.

        Raises:
            InputError: the cache lacks the crop, or the sampler does not say which one it is.
        """
        draw = CURRENT.get()
        if draw is None:
            raise InputError(
                'LoadImportance has to know the crop; set train_dataloader.sampler.type=mmmilan.ReproducibleSampler.'
            )
        if results.get('stands_in'):
            return results | dict(importance=np.ones(self.cache.dtype['importance'].shape, np.float32))
        pixels = torch.from_numpy(results['img']).permute(2, 0, 1)[None]
        record = self.cache.read(draw.crop, [results['sample_idx']], pixels)[0]
        if not record['checksum']:
            raise InputError(
                f'The cache {self.folder} lacks this crop of {results["img_path"]}; run tools/cache_targets.py, with '
                '--epochs as train_dataloader.sampler.crops.'
            )
        return results | dict(importance=importance_of(record))
