"""Run the teacher once for each crop, and recall what it gave whenever the crop comes again (docs/efficiency.md)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
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


@HOOKS.register_module()
class TeacherCacheHook(Hook):
    """Keep what the teacher gives of each crop, in 8 bits, and train on that when the crop comes again.

    Crops come again by ``train_dataloader.sampler.crops``; without it nothing is kept. The first time, too, training is
    on the rounded output, so a run that is resumed with its cache ends with the weights of an uninterrupted one.

    Args:
        cache: The folder of the cache. It stays, for other trainings with the same teacher, images, crops and seed, and
            may be filled before by ``tools/cache_targets.py``. By default it is ``teacher_cache`` in the work dir, and
            removed when the training ends; one that is stopped leaves it, to resume.

    Raises:
        InputError: the folder holds another cache, the disk is too small, the output of this model's teacher cannot be
            kept, or the training is not by epochs.
    """

    priority = 'LOW'  # the output is there when a hook counts the operations of a step

    def __init__(self, cache: str | None = None) -> None:
        self.folder = cache
        self.cache: TeacherCache | None = None

    def before_train(self, runner: Runner) -> None:
        loader, own = runner.train_loop.dataloader, Path(runner.work_dir, FOLDER)
        sampler = loader.batch_sampler.sampler
        self.crops = getattr(sampler, 'crops', None)
        if self.crops and not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise InputError('Crops come again by epochs; train by epochs, or without sampler.crops.')
        if not self.crops or (not self.folder and self.crops >= runner.max_epochs):
            runner.logger.info('No crop comes again (train_dataloader.sampler.crops): the teacher runs at each step.')
            remove_cache(own)
            return
        manifest = manifest_of(runner.cfg, unwrap(runner.model), loader.dataset, sampler.seed)
        if not self.folder and (runner.iter == 0 or not is_of(own, manifest)) and remove_cache(own):
            runner.logger.info(f'{own}, which is of another run, is removed.')
        barrier()  # all processes make the same cache
        folder = Path(self.folder or own)
        make_cache(folder, manifest)
        self.cache = TeacherCache(folder)
        check_space(self.cache, self.crops)
        size, crops = self.cache.place(self.crops), count(self.crops, 'crop')
        runner.logger.info(f"The teacher's output on {crops} of each image is kept in {folder}: {size / 1e6:,.0f} MB.")

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
        if self.cache is not None and not self.folder:
            remove_cache(self.cache.folder)
        self.cache = None


def remove_left(runner: Runner) -> None:
    """Remove what a stopped run left in its work dir, after it was resumed to its end without it."""
    own = Path(runner.work_dir, FOLDER).absolute()
    kept = [Path(hook.folder) for hook in runner.hooks if isinstance(hook, TeacherCacheHook) and hook.folder]
    if own not in [folder.absolute() for folder in kept] and remove_cache(own):
        runner.logger.info(f'{own}, of which the run makes no use any more, is removed.')


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
            'train without a cache (default_hooks.teacher_cache=None).'
        )
    if not isinstance(dataset, ImageFolder):
        raise InputError(
            f'A cache knows the images of an ImageFolder or ImageSources, not of a {type(dataset).__name__}; take one '
            'of these as train_dataloader.dataset, or train without a cache (default_hooks.teacher_cache=None).'
        )
    return describe(config, head.teacher, dataset, seed, model.backbone.num_patches, head.feature_dim)


def check_space(cache: TeacherCache, crops: int) -> None:
    """Raise an :class:`InputError` if the disk has too little space for what is not in the cache yet."""
    if not cache.is_writable:
        return
    needed = cache.place(crops) - 512 * (cache.folder / RECORDS).stat().st_blocks
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
        InputError: the images are not bytes, or have no number.
    """
    pixels, samples = batch['inputs'], batch['data_samples']
    pixels = pixels if isinstance(pixels, Tensor) else torch.stack(pixels)
    if pixels.dtype != torch.uint8 or not all('sample_idx' in sample for sample in samples):
        raise InputError(
            'TeacherCacheHook needs images in bytes and their sample_idx; leave normalisation to the data preprocessor '
            'and sample_idx among the meta_keys of PackInputs, or set train_dataloader.sampler.crops=None.'
        )
    images = np.array([sample.sample_idx for sample in samples])
    original = np.array([not is_replaced(sample) for sample in samples])
    records = np.zeros(len(images), cache.dtype)
    records[original] = cache.read(crop, images[original], pixels[torch.from_numpy(original)])
    if (unknown := records['checksum'] == 0).any():
        rows = torch.from_numpy(unknown)
        output = model.head.run_teacher(model.data_preprocessor(batch, training=True)['inputs'][rows])
        records[unknown] = encode(pixels[rows], *output)
        cache.write(crop, images[original & unknown], records[original & unknown])
    return decode(records, next(model.parameters()).device)
