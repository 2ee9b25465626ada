"""Run the teacher once for each crop, and recall what it gave whenever the crop comes again (docs/efficiency.md)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dist import barrier
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from mmmilan.datasets.image_folder import ImageFolder, is_replaced
from mmmilan.errors import InputError, count
from mmmilan.models.targets import Target
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS
from mmmilan.teachers.cache import (
    RECORDS,
    TeacherCache,
    decode,
    describe,
    differences,
    encode,
    make_cache,
    remove_cache,
)

FOLDER = 'teacher_cache'  # in the work dir
OTHER_TEACHER = 0.02  # 2 - 2 cos; rounding and precision of the teacher's weights make 1e-4


@HOOKS.register_module()
class TeacherCacheHook(Hook):
    """Keep what the teacher gives of each crop, in 8 bits, and train on that when the crop comes again.

    Crops come again by ``train_dataloader.sampler.crops``; without it nothing is kept. The first time, too, training is
    on the rounded output, so a run that is resumed with its cache ends with the weights of an uninterrupted one.

    Args:
        cache: The folder of the cache. It stays, for other trainings with the same teacher, images, crops and seed, and
            may be filled before by ``tools/cache_targets.py``. By default it is ``teacher_cache`` in the work dir, and
            removed when the training is complete.

    Raises:
        InputError: the folder holds another cache, the disk is too small, the output of this model's teacher cannot be
            kept, or the training is not by epochs.
    """

    priority = 'LOW'  # the output is there when a hook counts the operations of a step

    def __init__(self, cache: str | None = None) -> None:
        self.folder = cache
        self.cache: TeacherCache | None = None

    def before_train(self, runner: Runner) -> None:
        loader = runner.train_loop.dataloader
        sampler, self.crops = loader.batch_sampler.sampler, getattr(loader.batch_sampler.sampler, 'crops', None)
        if not self.crops:
            runner.logger.info('No train_dataloader.sampler.crops: the teacher runs at each step.')
            return
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise InputError('Crops come again by epochs; train by epochs, or without sampler.crops.')
        manifest = manifest_of(runner.cfg, unwrap(runner.model), loader.dataset, sampler.seed)
        folder = Path(self.folder or Path(runner.work_dir, FOLDER))
        if not self.folder and (runner.iter == 0 or not is_of(folder, manifest)):
            remove_cache(folder)
        barrier()  # all processes make the same cache
        make_cache(folder, manifest)
        self.cache = TeacherCache(folder)
        check_space(self.cache, self.crops)
        size, crops = self.crops * self.cache.num_images * self.cache.dtype.itemsize, count(self.crops, 'crop')
        runner.logger.info(f"The teacher's output on {crops} of each image is kept in {folder}: {size / 1e9:.1f} GB.")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.cache is not None:
            model = unwrap(runner.model)
            with runner.optim_wrapper.optim_context(runner.model):
                model.head.recalled = recall_or_run(self.cache, model, runner.epoch % self.crops, data_batch)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if self.cache is not None:
            unwrap(runner.model).head.recalled = None

    def after_train(self, runner: Runner) -> None:
        if self.cache is not None and not self.folder and runner.iter >= runner.max_iters:
            remove_cache(self.cache.folder)
        self.cache = None


def is_of(folder: Path, manifest: dict) -> bool:
    """Whether a folder holds the cache that a manifest describes."""
    try:
        return not differences(folder, manifest)
    except InputError:  # none, or a damaged one
        return False


def manifest_of(config: Config, model: nn.Module, dataset: object, seed: int) -> dict:
    """What describes the cache of a training, see :func:`describe`.

    Raises:
        InputError: the model or its images have no output of one teacher for each crop.
    """
    head = getattr(model, 'head', None)
    if not isinstance(head, Target) or head.teacher is None or type(head).target is not Target.target:
        raise InputError(
            'Only the features of a single teacher can be kept; take CLIPTarget or LayerAlignment as the head, or '
            'leave TeacherCacheHook out.'
        )
    if not isinstance(dataset, ImageFolder):
        raise InputError(
            f'A cache knows the images of an ImageFolder or ImageSources, not of a {type(dataset).__name__}; take one '
            'of these as train_dataloader.dataset, or leave TeacherCacheHook out.'
        )
    return describe(config, dataset, seed, model.backbone.num_patches, head.feature_dim)


def check_space(cache: TeacherCache, crops: int) -> None:
    """Raise an :class:`InputError` if the disk has too little space for what is not in the cache yet."""
    needed = crops * cache.num_images * cache.dtype.itemsize - 512 * (cache.folder / RECORDS).stat().st_blocks
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise InputError(
            f"The teacher's output takes {needed / 1e9:.1f} GB more in {cache.folder}, and {free / 1e9:.1f} GB are "
            'free; free some, or train without a cache (train_dataloader.sampler.crops=None).'
        )


@torch.no_grad()
def recall_or_run(cache: TeacherCache, model: nn.Module, crop: int, batch: dict) -> tuple[Tensor, Tensor]:
    """The teacher's output of a batch, rounded to 8 bits: from the cache, or else by the teacher, and then kept.

    Args:
        cache: The cache.
        model: A ``MILAN``.
        crop: Number of the crop that these images have.
        batch: ``inputs`` [B, 3, H, W], uint8, and B ``data_samples``, as a data loader gives them.

    Returns:
        Features [B, 1 + N, C] and importance [B, N], float32.

    Raises:
        InputError: the cache is of another teacher.
    """
    pixels = batch['inputs'] if isinstance(batch['inputs'], Tensor) else torch.stack(batch['inputs'])
    images = np.array([sample.sample_idx for sample in batch['data_samples']])
    original = np.array([not is_replaced(sample) for sample in batch['data_samples']])

    def run(rows: np.ndarray) -> np.ndarray:
        """The teacher's output on some images of the batch, bool [B], as records."""
        inputs = model.data_preprocessor(batch, training=True)['inputs'][torch.from_numpy(rows)]
        return encode(pixels[torch.from_numpy(rows)], *model.head.run_teacher(inputs))

    records = cache.read(crop, images, pixels)
    known = original & (records['checksum'] > 0)
    if known.any() and not cache.compared:
        compare(cache, records[known], run(known))
        cache.compared = True
    if not known.all():
        records[~known] = run(~known)
        cache.write(crop, images[original & ~known], records[original & ~known])
    return decode(records, next(model.parameters()).device)


def compare(cache: TeacherCache, records: np.ndarray, output: np.ndarray) -> None:
    """Raise an :class:`InputError` if records [B] are not the teacher's output, records [B] of the same crops."""
    codes = (torch.from_numpy(each['codes'].astype(np.float32)) for each in (records, output))
    difference = float((2 - 2 * F.cosine_similarity(*codes, dim=-1)).mean())
    if difference > OTHER_TEACHER:
        raise InputError(
            f"The cache {cache.folder} is not this teacher's (2 - 2 cos = {difference:.2g}); its weights have changed: "
            'remove it, or choose another folder.'
        )
