"""The config of pretraining on a user's own images: the recipe, fitted to images, encoder and teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.config import Config

BASE = 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
ARCHS = {'tiny': 'deit-tiny', 'small': 'deit-small'}  # mmpretrain's own 'small' is wider and shallower
BATCH_SIZE = {'cuda': 128, 'cpu': 32}
EVALUATIONS = 10  # per run
CHECKPOINTS = 20  # per run


def read_base(sources: Sequence[str | os.PathLike], num_images: int, batch_size: int | None, seed: int) -> Config:
    """The recipe's config with the user's images."""
    from mmengine.config import Config

    from mmmilan.checkpoints.zoo import zoo_root
    from mmmilan.datasets.splits import evaluation_source, training_sources

    config = Config.fromfile(zoo_root() / BASE)
    config.runner_type = 'mmmilan.ConsoleRunner'
    batch_size = batch_size or default_batch_size(num_images)
    images = (
        (config.train_dataloader, training_sources(sources)),
        (config.test_dataloader, [evaluation_source(source) for source in sources]),
    )
    for loader, chosen in images:
        loader.update(batch_size=batch_size, num_workers=min(loader.num_workers, os.cpu_count()))
        loader.dataset.update(type='mmmilan.ImageSources', sources=[os.fspath(source) for source in chosen])
        del loader.dataset['data_root']
    config.randomness = dict(seed=seed)
    return config


def set_image_size(config: Config, img_size: tuple[int, int] | int) -> None:
    """Set the size of the crops in training and of the whole images in evaluation."""
    from mmmilan.models.teachers.base import pair

    load, *_, pack = config.test_dataloader.dataset.pipeline
    crop, (height, width) = config.train_dataloader.dataset.pipeline[0], pair(img_size)
    crop.scale = img_size
    if height == width:
        _, resize, centre, _ = config.test_dataloader.dataset.pipeline
        resize.scale, centre.crop_size = round(height * 256 / 224), height
    else:
        crop.aspect_ratio_range = (3 / 4 * width / height, 4 / 3 * width / height)
        resize = dict(type='Resize', scale=(width, height), backend='pillow', interpolation='bicubic')
        config.test_dataloader.dataset.pipeline = [load, resize, pack]


def add_evaluation(config: Config, sources: Sequence[str | os.PathLike], labelled: str | os.PathLike | None) -> None:
    """Evaluate the encoder during training, on labelled images if there are any.

    Raises:
        InputError: ``labelled`` has no folders that name classes.
    """
    from mmmilan.datasets.image_folder import list_images
    from mmmilan.datasets.splits import class_folders, evaluation_source

    given = [labelled] if labelled is not None else sources
    root, classes = class_folders(evaluation_source(given[0])) if len(given) == 1 else ('', [])
    if labelled is not None and not classes:
        raise InputError(
            f'{labelled} has no folders that name classes; give a folder with one folder of images per class.'
        )
    dataset = dict(config.test_dataloader.dataset)
    if classes and (labelled is not None or len(list_images(root)) >= 5 * len(classes)):
        del dataset['sources']
        dataset.update(type='mmmilan.ImageFolder', data_root=os.fspath(root), with_label=True)
    config.custom_hooks.append(dict(type='mmmilan.OnlineEvaluationHook', dataset=dataset))


def default_batch_size(num_images: int) -> int:
    """The number of images per step, if the user does not set it."""
    from mmengine.device import get_device

    from mmmilan.engine.schedule import fit_batch_size

    return fit_batch_size(num_images, BATCH_SIZE.get(get_device(), 128))


def set_start(config: Config, start: str | None) -> None:
    """Set the initial weights of the encoder; they are found or downloaded at once.

    Raises:
        InputError: there are no such weights.
    """
    from mmmilan.checkpoints.zoo import resolve_checkpoint

    if start is not None:
        resolve_checkpoint(start)
        config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=os.fspath(start))


def teacher_config(teacher: str | dict[str, Any]) -> dict[str, Any]:
    """The config of a teacher from MODEL:TAG of open_clip, the name of a timm ViT, a file or a URL.

    Raises:
        InputError: it is none of these.
    """
    import timm

    from mmmilan.checkpoints.zoo import resolve_checkpoint

    if not isinstance(teacher, str):
        return dict(teacher)
    if '://' in teacher:
        teacher = str(resolve_checkpoint(teacher))
    if Path(teacher).is_file():
        return dict(type='mmmilan.OpenCLIPTeacher', pretrained=teacher)
    model, separator, tag = teacher.partition(':')
    if separator:
        return dict(type='mmmilan.OpenCLIPTeacher', model=model, pretrained=tag)
    if timm.is_model(teacher.split('.')[0]):
        return dict(type='mmmilan.TimmTeacher', model=teacher)
    raise InputError(f'The teacher {teacher} is unknown; give a file, MODEL:TAG of open_clip, or a ViT of timm.')


def set_model(
    config: Config, arch: str | dict, teacher: str | dict, img_size: tuple[int, int] | int, patch_size: int
) -> None:
    """Set encoder and teacher, and the sizes of decoder and target that follow from them.

    Raises:
        InputError: the image is not a whole number of patches, or the encoder or the teacher is unknown.
    """
    from mmmilan.models.fitting import as_num_patches
    from mmmilan.models.teachers.base import pair
    from mmmilan.registry import MODELS

    if any(side % patch_size for side in pair(img_size)):
        raise InputError(f'img_size={img_size} is not a multiple of patch_size={patch_size}; choose one that is.')
    model, grid = config.model, tuple(side // patch_size for side in pair(img_size))
    arch = ARCHS.get(arch, arch) if isinstance(arch, str) else dict(arch)
    model.backbone.update(arch=arch, img_size=img_size, patch_size=patch_size)
    width = encoder_width(arch)
    model.neck.update(num_patches=as_num_patches(grid), embed_dim=width)
    if width < model.neck.decoder_embed_dim:
        model.neck.update(decoder_embed_dim=width, decoder_depth=4, decoder_num_heads=max(1, width // 32))
    model.head.teacher = teacher_config(teacher)
    built = MODELS.build(dict(model.head.teacher))  # downloads it if necessary
    if built.grid != grid:
        model.head.teacher.input_size = tuple(side * built.patch_size for side in grid)
    model.neck.predict_feature_dim = built.feature_dim


def encoder_width(arch: str | dict[str, Any]) -> int:
    """The width D of a ViT.

    Raises:
        InputError: mmpretrain has no ViT of this name, or a dict lacks a size.
    """
    from mmpretrain.models import VisionTransformer

    if isinstance(arch, dict):
        missing = {'embed_dims', 'num_layers', 'num_heads', 'feedforward_channels'} - set(arch)
        if missing:
            raise InputError(f'The arch lacks {", ".join(sorted(missing))}; give them all.')
        return arch['embed_dims']
    if arch not in VisionTransformer.arch_zoo:
        names = ', '.join([*ARCHS, 'base', 'large', 'huge'])
        raise InputError(f'The arch {arch!r} is unknown; choose one of {names}, or give a dict.')
    return VisionTransformer.arch_zoo[arch]['embed_dims']


def set_schedule(config: Config, num_images: int, epochs: int | None) -> None:
    """Set length, warm-up and learning rate for this number of images, and how often to evaluate and save."""
    from mmengine.logging import print_log

    from mmmilan.engine.schedule import fit_schedule

    batch_size = config.train_dataloader.batch_size
    schedule = fit_schedule(num_images, batch_size, epochs)
    config.optim_wrapper.optimizer.lr = schedule.lr
    config.param_scheduler = schedule.param_scheduler()
    config.train_cfg.max_epochs = schedule.epochs
    config.default_hooks.checkpoint.interval = max(1, schedule.epochs // CHECKPOINTS)
    config.custom_hooks[-1]['interval'] = max(1, schedule.epochs // EVALUATIONS)
    config.auto_scale_lr.enable = False  # the rate is already that of this batch size
    print_log(
        f'{num_images} images in batches of {batch_size}: {schedule.epochs} epochs of {schedule.steps_per_epoch} '
        f'steps, the first {schedule.warmup} for warm-up, learning rate {schedule.lr:g}.',
        logger='current',
    )
