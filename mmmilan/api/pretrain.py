"""MILAN pretraining on one's own images, in one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.config import Config


def pretrain(
    data: Sequence[str | os.PathLike] | str | os.PathLike,
    out: str | os.PathLike,
    *,
    arch: str | dict[str, Any] = 'base',
    teacher: str | dict[str, Any] = 'ViT-B-16-quickgelu:openai',
    start: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    img_size: tuple[int, int] | int = 224,
    patch_size: int = 16,
    labelled: str | os.PathLike | None = None,
    seed: int = 0,
    resume: bool = False,
    **changes: Any,
) -> Path:
    """Pretrain a ViT with MILAN on your own images; no label is used.

    The decoder's and the target's widths follow from encoder and teacher, the schedule from the number of images: about
    10000 steps in 20 to 400 epochs, a tenth of them for warm-up, and a learning rate that follows the square root of
    the batch, with ``start`` and without. Every tenth of the run the encoder is evaluated, see
    ``mmmilan.OnlineEvaluationHook``.

    The config that comes of all this is written to ``out/config.py``; ``tools/train.py out/config.py`` trains the same,
    and ``tools/dist_train.sh out/config.py 8`` does on eight GPUs.

    Args:
        data: one or more folders of images, flat or nested, and tar shards. Of a folder that is divided into ``train``
            and ``val`` or ``test``, the latter are left for evaluation and report.
        out: folder of config, log, checkpoints and report.
        arch: 'tiny', 'small', 'base', 'large', another name of mmpretrain's ViT, or a dict of ``embed_dims``,
            ``num_layers``, ``num_heads`` and ``feedforward_channels``. A decoder is no wider than its encoder, and has
            eight blocks, or four for an encoder of fewer than 512 dimensions.
        teacher: MODEL:TAG of open_clip, the name of a timm ViT, a file of weights, or the config of a teacher.
        start: where the encoder starts: a model of the zoo, a file or a URL in any layout; by default, random weights.
        epochs: how often each image is seen.
        batch_size: images in a step; by default at most 128 on a GPU and 32 without, fewer for a small folder.
        img_size: side of the images that the encoder sees, or their height and width, in pixels. For a rectangle, crops
            have its proportions, and whole images are resized to it, whatever theirs.
        patch_size: side of a patch, in pixels.
        labelled: folder with one folder of images a class, for evaluation and report alone; by default ``data`` itself
            if it has such folders.
        seed: of all random numbers.
        resume: go on with the last checkpoint in ``out``.
        changes: anything else in the config, e.g. ``model=dict(masking=dict(mask_ratio=0.6))`` in Python or
            ``--model.masking.mask_ratio 0.6`` on the command line.

    Returns:
        Where the weights of encoder and decoder are, with their config: ``out/milan.pth``. Every function of mmmilan
        and every downstream config takes this file. Beside it is ``report.html``, see :func:`mmmilan.report`.

    Raises:
        InputError: before anything is trained, if images, teacher or start are missing or do not fit.

    Examples:
        >>> mmmilan.pretrain('photos', 'runs/photos', start='milan_vit-base-p16_16xb256-amp-coslr-400e_in1k')
    """
    from mmengine.registry import DefaultScope

    from mmmilan.api.recipe import (
        add_evaluation,
        read_base,
        set_image_size,
        set_model,
        set_schedule,
        set_start,
    )

    sources = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    folder = Path(out)
    check_out(folder, resume)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        num_images = count_images(sources, batch_size)
        config = read_base(sources, num_images, batch_size, seed)
        set_image_size(config, img_size)
        add_evaluation(config, sources, labelled)
        set_start(config, start)
        set_model(config, arch, teacher, img_size, patch_size)
        set_schedule(config, num_images, epochs)
    config.merge_from_dict(changes)
    config.work_dir = str(folder)
    path = write_config(config, folder)
    weights = train(path, resume)
    write_report(weights, sources if labelled is None else [labelled])
    return weights


def check_out(folder: Path, resume: bool) -> None:
    """Refuse to write over a run, or to go on with none."""
    from mmmilan.checkpoints.newest import checkpoints_in

    has_run = bool(checkpoints_in(folder))
    if has_run and not resume:
        raise InputError(f'{folder} holds a run already; choose another folder, or go on with it by resume (--resume).')
    if resume and not has_run:
        raise InputError(f'{folder} holds no checkpoint to go on with; leave out resume, or correct the folder.')


def count_images(sources: Sequence[str | os.PathLike], batch_size: int | None) -> int:
    """How many images there are to train on, which must fill a batch."""
    from mmmilan.datasets.sources import list_images, training_images

    num_images = sum(len(list_images(part)) for source in sources for part in training_images(source))
    if batch_size is not None and batch_size > num_images:
        raise InputError(f'The {num_images} images do not fill one batch of {batch_size}; lower batch_size.')
    return num_images


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
    from mmmilan.checkpoints.newest import find_newest
    from mmmilan.engine.launch import launched
    from mmmilan.engine.work_dir import checkpoint_folder

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


def write_report(weights: Path, sources: Sequence[str | os.PathLike]) -> None:
    """The page beside the weights. Where there can be none, a warning says why: the training is not lost for it."""
    from mmengine.logging import print_log

    from mmmilan.api.report import report

    try:
        page = report(weights, sources, weights.with_name('report.html'))
        print_log(f'Was it worth it? {page} says what can be said.', logger='current')
    except InputError as error:
        print_log(f'No report: {error}', logger='current', level=logging.WARNING)
