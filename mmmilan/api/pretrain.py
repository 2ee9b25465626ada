"""MILAN pretraining on one's own images, in one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.config import Config

BASE = 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
ARCHS = {'tiny': 'deit-tiny', 'small': 'deit-small'}  # mmpretrain's own 'small' is wider and less deep
BATCH_SIZE = {'cuda': 128, 'cpu': 32}
EVALUATIONS = 10  # in a run
CHECKPOINTS = 20


def pretrain(
    data: Sequence[str | os.PathLike] | str | os.PathLike,
    out: str | os.PathLike,
    *,
    arch: str | dict[str, Any] = 'base',
    teacher: str | dict[str, Any] = 'ViT-B-16-quickgelu:openai',
    start: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    img_size: int = 224,
    patch_size: int = 16,
    labelled: str | os.PathLike | None = None,
    seed: int = 0,
    resume: bool = False,
    **changes: Any,
) -> Path:
    """Pretrain a ViT with MILAN on your own images; no label is used.

    The decoder's and the target's widths follow from encoder and teacher, the schedule from the number of images: about
    10000 steps in 20 to 400 epochs, a tenth of them for warm-up, and a learning rate that follows the square root of
    the batch. Every tenth of the run the encoder is evaluated, see ``mmmilan.OnlineEvaluationHook``.

    The config that comes of all this is written to ``out/config.py``; ``tools/train.py out/config.py`` trains the same,
    and ``tools/dist_train.sh out/config.py 8`` does on eight GPUs.

    Args:
        data: one or more folders of images, flat or nested, and tar shards.
        out: folder of config, log and checkpoints.
        arch: 'tiny', 'small', 'base', 'large', another name of mmpretrain's ViT, or a dict of ``embed_dims``,
            ``num_layers``, ``num_heads`` and ``feedforward_channels``. A decoder is no wider than its encoder, and has
            eight blocks, or four for an encoder of fewer than 512 dimensions.
        teacher: MODEL:TAG of open_clip, the name of a timm ViT, a file of weights, or the config of a teacher.
        start: where the encoder starts: a model of the zoo, a file or a URL in any layout; by default, random weights.
        epochs: how often each image is seen.
        batch_size: images in a step; by default at most 128 on a GPU and 32 without, fewer for a small folder.
        img_size: side of the images that the encoder sees, in pixels.
        patch_size: side of a patch, in pixels.
        labelled: folder with one folder of images a class, for the evaluation alone; by default ``data`` itself if it
            has such folders.
        seed: of all random numbers.
        resume: go on with the last checkpoint in ``out``.
        changes: anything else in the config, e.g. ``model=dict(masking=dict(mask_ratio=0.6))`` in Python or
            ``--model.masking.mask_ratio 0.6`` on the command line.

    Returns:
        Where the weights of encoder and decoder are, with their config: ``out/milan.pth``. Every function of mmmilan
        and every downstream config takes this file.

    Raises:
        InputError: before anything is trained, if images, teacher or start are missing or do not fit.

    Examples:
        >>> mmmilan.pretrain('photos', 'runs/photos', start='milan_vit-base-p16_16xb256-amp-coslr-400e_in1k')
    """
    from mmengine.registry import DefaultScope

    sources = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    folder = Path(out)
    check_out(folder, resume)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        num_images = count_images(sources, batch_size)
        config = read_base(sources, num_images, labelled, batch_size, img_size, seed)
        set_start(config, start)
        set_model(config, arch, teacher, img_size, patch_size)
        set_schedule(config, num_images, epochs, start)
    config.merge_from_dict(changes)
    config.work_dir = str(folder)
    path = write_config(config, folder)
    return train(path, resume)


def check_out(folder: Path, resume: bool) -> None:
    """Refuse to write over a run, or to go on with none."""
    from mmmilan.engine.work_dir import checkpoints_in

    has_run = bool(checkpoints_in(folder))
    if has_run and not resume:
        raise InputError(f'{folder} holds a run already; choose another folder, or go on with it by resume (--resume).')
    if resume and not has_run:
        raise InputError(f'{folder} holds no checkpoint to go on with; leave out resume, or correct the folder.')


def count_images(sources: Sequence[str | os.PathLike], batch_size: int | None) -> int:
    """How many images there are, which must fill a batch."""
    from mmmilan.datasets.sources import list_images

    num_images = sum(len(list_images(source)) for source in sources)
    if batch_size is not None and batch_size > num_images:
        raise InputError(f'The {num_images} images do not fill one batch of {batch_size}; lower batch_size.')
    return num_images


def default_batch_size(num_images: int) -> int:
    """Images in a step, if the user does not say."""
    from mmengine.device import get_device

    from mmmilan.engine.schedule import fit_batch_size

    return fit_batch_size(num_images, BATCH_SIZE.get(get_device(), 128))


def read_base(
    sources: Sequence[str | os.PathLike],
    num_images: int,
    labelled: str | os.PathLike | None,
    batch_size: int | None,
    img_size: int,
    seed: int,
) -> Config:
    """The recipe's config with the user's images, and how to load and to evaluate them."""
    from mmengine.config import Config

    from mmmilan.checkpoints.zoo import zoo_root

    config = Config.fromfile(zoo_root() / BASE)
    batch_size = batch_size or default_batch_size(num_images)
    for loader in (config.train_dataloader, config.test_dataloader):
        loader.update(batch_size=batch_size, num_workers=min(loader.num_workers, os.cpu_count()))
        loader.dataset.update(type='mmmilan.ImageSources', sources=[os.fspath(source) for source in sources])
        del loader.dataset['data_root']
    config.train_dataloader.dataset.pipeline[0].scale = img_size
    _, resize, crop, _ = config.test_dataloader.dataset.pipeline
    resize.scale, crop.crop_size = round(img_size * 256 / 224), img_size
    config.randomness = dict(seed=seed)
    config.custom_hooks.append(online_evaluation(config, sources, labelled, num_images))
    return config


def online_evaluation(
    config: Config, sources: Sequence[str | os.PathLike], labelled: str | os.PathLike | None, num_images: int
) -> dict:
    """The hook that evaluates the encoder, on labelled images where there are some."""
    from mmmilan.datasets.sources import class_folders

    if labelled is not None and not class_folders(labelled):
        raise InputError(
            f'{labelled} has no folders that name classes; give a folder with one folder of images a class.'
        )
    if labelled is None and len(sources) == 1:
        classes = class_folders(sources[0])
        labelled = sources[0] if classes and num_images >= 5 * len(classes) else None
    dataset = dict(config.test_dataloader.dataset)
    if labelled is not None:
        del dataset['sources']
        dataset.update(type='mmmilan.ImageFolder', data_root=os.fspath(labelled), with_label=True)
    return dict(type='mmmilan.OnlineEvaluationHook', dataset=dataset)


def set_start(config: Config, start: str | None) -> None:
    """Where the encoder starts, which is looked for at once."""
    from mmmilan.checkpoints.zoo import resolve_checkpoint

    if start is not None:
        resolve_checkpoint(start)
        config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=os.fspath(start))


def teacher_config(teacher: str | dict[str, Any]) -> dict[str, Any]:
    """The config of a teacher that is named by MODEL:TAG of open_clip, by a timm model, a file or a URL."""
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


def set_model(config: Config, arch: str | dict, teacher: str | dict, img_size: int, patch_size: int) -> None:
    """Encoder, teacher, and what follows from them."""
    from mmmilan.registry import MODELS

    if img_size % patch_size:
        raise InputError(f'img_size={img_size} is not a multiple of patch_size={patch_size}; choose one that is.')
    model, side = config.model, img_size // patch_size
    arch = ARCHS.get(arch, arch) if isinstance(arch, str) else dict(arch)
    model.backbone.update(arch=arch, img_size=img_size, patch_size=patch_size)
    width = encoder_width(arch)
    model.neck.update(num_patches=side**2, embed_dim=width)
    if width < model.neck.decoder_embed_dim:
        model.neck.update(decoder_embed_dim=width, decoder_depth=4, decoder_num_heads=max(1, width // 32))
    model.head.teacher = teacher_config(teacher)
    built = MODELS.build(dict(model.head.teacher))  # which downloads it, if need be
    if built.num_patches != side**2:
        model.head.teacher.input_size = side * built.patch_size
    model.neck.predict_feature_dim = built.feature_dim


def encoder_width(arch: str | dict[str, Any]) -> int:
    """Width D of a ViT.

    Raises:
        InputError: mmpretrain's ViT has no such name.
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


def set_schedule(config: Config, num_images: int, epochs: int | None, start: str | None) -> None:
    """Length, warm-up and learning rate for this number of images; evaluation and checkpoints some times in the run."""
    from mmengine.logging import print_log

    from mmmilan.engine.schedule import fit_schedule

    batch_size = config.train_dataloader.batch_size
    schedule = fit_schedule(num_images, batch_size, epochs, start is not None)
    config.optim_wrapper.optimizer.lr = schedule.lr
    config.param_scheduler = schedule.param_scheduler()
    config.train_cfg.max_epochs = schedule.epochs
    config.default_hooks.checkpoint.interval = max(1, schedule.epochs // CHECKPOINTS)
    config.custom_hooks[-1]['interval'] = max(1, schedule.epochs // EVALUATIONS)
    config.auto_scale_lr.enable = False  # the rate is for this batch already
    print_log(
        f'{num_images} images in batches of {batch_size}: {schedule.epochs} epochs of {schedule.steps_per_epoch} '
        f'steps, the first {schedule.warmup} for warm-up, learning rate {schedule.lr:g}.',
        logger='current',
    )


def write_config(config: Config, folder: Path) -> Path:
    """Write the config to the folder, as ``tools/train.py`` reads it."""
    from mmmilan.files import write_text

    path = folder / 'config.py'
    write_text(path, f'# python tools/train.py {path}\n{config.pretty_text}')
    return path


def train(path: Path, resume: bool) -> Path:
    """Train as ``tools/train.py`` does; returns the weights without what training alone needs."""
    import time

    import torch
    from mmengine.config import Config

    from mmmilan.checkpoints.io import load_checkpoint_file, save_checkpoint_file
    from mmmilan.engine.launch import launched
    from mmmilan.engine.work_dir import checkpoint_folder, find_newest

    config = Config.fromfile(path)
    config.resume = resume
    config.launcher = 'none'
    config.experiment_name = f'{path.parent.name}-{time.time_ns()}'  # MMEngine keeps loggers by this name
    begin = time.monotonic()
    with launched(config, 'train') as runner:
        runner.train()
    checkpoint = load_checkpoint_file(find_newest(checkpoint_folder(config)))
    if not resume:  # or it would be the time of a part
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU'
        checkpoint['meta'].update(training_seconds=time.monotonic() - begin, training_device=device)
    weights = path.parent / 'milan.pth'
    save_checkpoint_file({key: checkpoint[key] for key in ('meta', 'state_dict')}, weights)
    return weights
