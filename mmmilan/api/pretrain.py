"""MILAN pretraining on a user's own images, in one call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmmilan import arguments
from mmmilan.api.runs import check_out, save_weights, set_folder, train, trained_anyway
from mmmilan.arguments import checked
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.config import Config

FILES = ('config.py', 'milan.pth', 'report.html')  # what pretrain itself writes beside the files of the run


@checked
def pretrain(
    data: arguments.Paths | None = None,
    out: arguments.Path | None = None,
    *,
    arch: str | dict[str, Any] | None = None,
    recipe: Literal['milan', 'few-images'] | None = None,
    teacher: arguments.Path | dict[str, Any] | None = None,
    start: arguments.Path | None = None,
    epochs: arguments.Count | None = None,
    batch_size: arguments.Count | None = None,
    img_size: tuple[arguments.Pixels, arguments.Pixels] | arguments.Pixels | None = None,
    patch_size: arguments.Pixels | None = None,
    labelled: arguments.Path | None = None,
    seed: arguments.Seed | None = None,
    resume: bool = False,
    **changes: Any,
) -> Path:
    """Pretrain a ViT with MILAN on your own images, without labels.

    The widths of decoder and target follow from encoder and teacher, the schedule from the number of images: about
    10000 steps in 20 to 400 epochs, a tenth of them for warm-up, and a learning rate that rises with the square root of
    the batch size and falls with the width of the encoder, with or without ``start``. The encoder is evaluated before
    training and about ten times in it, see ``mmmilan.OnlineEvaluationHook``.

    The resulting config is written to ``out/config.py``; ``mmmilan train out/config.py`` runs the same training, and
    with ``--gpus 8`` on eight GPUs, where schedule and rate follow the images of a step of all of them.

    ``resume`` continues the run in ``out`` with its own config, and needs no other argument. Those that are given and
    differ from the run are applied and named in the log, see docs/reliability.md; encoder, image size, start and recipe
    stay.

    Args:
        data: one or more folders of images, flat or nested, and tar shards. If a folder is divided into splits, ``val``
            and ``test`` are kept for evaluation and report. A resumed run has its own by default.
        out: folder for config, log, checkpoints and report.
        arch: 'base' (default), 'tiny', 'small', 'large', another name of mmpretrain's ViT, or a dict of ``embed_dims``,
            ``num_layers``, ``num_heads`` and ``feedforward_channels``. The decoder is no wider than the encoder, and
            has eight blocks, or four if the encoder has fewer than 512 dimensions.
        recipe: 'milan', the published method, or 'few-images', with random masks of half the patches, a decoder of one
            block and a third of the loss on the class token, which was better on small folders; by default this one up
            to 100,000 images. Its crops come again up to eight times, and ``out/teacher_cache`` keeps what the teacher
            gives of each while it trains.
        teacher: MODEL:TAG of open_clip (by default ViT-B-16-quickgelu:openai), the name of a timm ViT, a file of
            weights, or another name or the config of a teacher, see ``mmmilan.teachers.teacher_config``. It
            sees the pixels that it was trained on.
        start: initial weights of the encoder: a model of the zoo, a file or a URL in any layout; by default random.
        epochs: number of epochs; by default it follows from the number of images.
        batch_size: number of images per step; by default at most 128 on a GPU and 32 on a CPU, fewer for a small
            folder.
        img_size: side of the images that the encoder sees, or their height and width, in pixels; by default 224. For a
            rectangle, crops have its aspect ratio, and whole images are resized to it, whatever their aspect ratio.
        patch_size: side of a patch, in pixels, by default 16.
        labelled: folder with a folder of images for each class, used only for evaluation and report; by default
            ``data`` itself if it has such folders.
        seed: seed of all random numbers, by default 0.
        resume: continue the run in ``out`` from its newest complete checkpoint.
        changes: anything else in the config, e.g. ``model=dict(masking=dict(mask_ratio=0.6))`` in Python or
            ``--model.masking.mask_ratio 0.6`` on the command line.

    Returns:
        The path of the weights of encoder and decoder with their config, ``out/milan.pth``. Every function of mmmilan
        that takes an encoder and every downstream config accept this file. ``report.html`` is beside it, see
        :func:`mmmilan.report`.

    Raises:
        InputError: images, teacher or start are missing or do not fit; it is raised before training starts.

    Examples:
        >>> mmmilan.pretrain('photos', 'runs/photos', start='milan_vit-base-p16_16xb256-amp-coslr-400e_in1k')
    """
    from mmengine.logging import print_log

    from mmmilan.api.few_images import about_recipe, keep_repeated, repeat_crops
    from mmmilan.api.recipe import base_config, keep_call, new_config, resumed_config
    from mmmilan.building import change_config, check_top, dotted, in_scope
    from mmmilan.checkpoints.io import find_newest
    from mmmilan.datasets.image_folder import as_sources
    from mmmilan.datasets.listing import listed_once
    from mmmilan.engine.work_dir import can_resume
    from mmmilan.failures import step_errors

    for option in dotted(changes):  # before the teacher is downloaded
        check_top(base_config(), option, inspect.signature(pretrain).parameters)
    if out is None:
        raise InputError('pretrain lacks the folder to write; give it (--out).')
    if data is None and not resume:
        raise InputError(f'pretrain has one folder, {out}; give the images first and then the folder to write.')
    sources = None if data is None else as_sources(data)
    folder = Path(out)
    check_out(folder, resume, FILES)
    given = dict(arch=arch, teacher=teacher, start=start, epochs=epochs, batch_size=batch_size)
    given |= dict(img_size=img_size, patch_size=patch_size, labelled=labelled, seed=seed, recipe=recipe)
    given = {name: value for name, value in given.items() if value is not None}
    with listed_once():
        with in_scope():
            if resume:
                config = resumed_config(folder, sources, changes, **given)
            else:
                config = new_config(sources, changes=changes, **given)
        change_config(config, changes, inspect.signature(pretrain).parameters)
        if not resume or 'epochs' in given:
            repeat_crops(config, folder)
        keep_repeated(config)
        set_folder(config, folder)
        keep_call(config, 'pretrain', given | dict(data=data or [], out=out, resume=resume), changes)
        if not resume:
            print_log(about_recipe(config), logger='current')
        with step_errors(changes):
            meta = train(config, folder, resume and can_resume(config))
        weights = save_weights(find_newest(folder), folder / 'milan.pth', meta)
        if sources is None:
            sources = reported_images(config)
        write_report(weights, sources if labelled is None else [labelled])
    return weights


def reported_images(config: Config) -> list[str]:
    """What a resumed run reports on: its labelled folder, or else its data, with the splits if it has some."""
    from mmmilan.datasets.splits import evaluation_source, role_of, training_sources

    trained, held_out = config.train_dataloader.dataset.sources, config.test_dataloader.dataset.sources
    evaluated = [hook.dataset for hook in config.custom_hooks if hook.type == 'mmmilan.OnlineEvaluationHook']
    for root in (each.data_root for each in evaluated if each.get('with_label')):
        if not any(Path(root).is_relative_to(each) for each in held_out):
            return [root]
    whole = os.path.commonpath(map(os.path.abspath, [*trained, *held_out]))
    parts = [os.path.relpath(each, whole).partition('/')[0] for each in [*trained, *held_out]]
    if len(held_out) > 1 or not all(map(role_of, parts)):  # what is no data set, such as /, is not looked through
        return held_out
    same = list(map(os.fspath, [*training_sources(whole), evaluation_source(whole)])) == [*trained, *held_out]
    return [whole] if same else held_out


def write_report(weights: Path, sources: Sequence[str | os.PathLike]) -> None:
    """Write the report beside the weights."""
    from mmengine.logging import print_log

    from mmmilan.api.report import report

    with trained_anyway():
        page = report(sources, weights, weights.with_name('report.html'), overwrite=True)
        print_log(f'The report on the encoder is {page}.', logger='current')
