"""The config of pretraining on a user's own images: the recipe, fitted to images, encoder and teacher."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from mmmilan.api.few_images import drop_crops, set_recipe
from mmmilan.arguments import typed
from mmmilan.building import arch_sizes, change_config
from mmmilan.checkpoints.config import (
    CALL,
    NoConfig,
    call_of,
    config_within,
    gives_rgb,
    own_config,
    parse_config,
    read_config_file,
)
from mmmilan.checkpoints.foreign_config import check_foreign_config
from mmmilan.checkpoints.io import find_newest, load_checkpoint_file
from mmmilan.checkpoints.zoo import resolve_checkpoint, zoo_models, zoo_root
from mmmilan.components import type_name
from mmmilan.datasets.image_folder import list_images
from mmmilan.datasets.splits import class_folders, describe, evaluation_source, training_sources
from mmmilan.engine.schedule import fit_batch_size, fit_schedule, own_schedule, use_schedule, width_of
from mmmilan.errors import InputError, count, warn
from mmmilan.files import read_text
from mmmilan.models.fitting import as_num_patches
from mmmilan.teachers import build_teacher, teacher_config
from mmmilan.teachers.base import pair
from mmmilan.workers import default_workers

BASE = 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
ARCHS = {'tiny': 'deit-tiny', 'small': 'deit-small'}  # mmpretrain's own 'small' is wider and shallower
BATCH_SIZE = {'cuda': 128, 'cpu': 32}
EVALUATIONS = 10  # per run, about
CHECKPOINTS = 20  # per run


def base_config() -> Config:
    """The recipe's config."""
    return read_config_file(zoo_root() / BASE)


def new_config(
    sources: Sequence[str | os.PathLike],
    arch: str | dict[str, Any] = 'base',
    teacher: str | dict[str, Any] = 'ViT-B-16-quickgelu:openai',
    start: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    img_size: tuple[int, int] | int = 224,
    patch_size: int = 16,
    labelled: str | os.PathLike | None = None,
    seed: int = 0,
    recipe: str | None = None,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> Config:
    """The config of a new run; arguments of ``mmmilan.pretrain``. The caller makes the changes.

    Raises:
        InputError: an argument is wrong, or two do not fit.
    """
    num_images = count_images(training_sources(sources), batch_size)
    config = base_config()
    config.runner_type = 'mmmilan.ConsoleRunner'
    config.randomness = dict(seed=seed)
    set_data(config, sources)
    for loader in (config.train_dataloader, config.test_dataloader):
        loader.batch_size = batch_size or default_batch_size(num_images)
        loader.num_workers = default_workers(loader.num_workers)
    set_image_size(config, img_size)
    images = evaluation_images(config, sources, labelled)
    config.custom_hooks.append(dict(type='mmmilan.OnlineEvaluationHook', dataset=images))
    set_start(config, start)
    set_model(config, arch, teacher, img_size, patch_size)
    set_recipe(config, recipe, num_images, changes)
    set_schedule(config, num_images, epochs)
    return config


def resumed_config(
    folder: Path, sources: Sequence[str | os.PathLike] | None, changes: dict[str, Any], **given: Any
) -> Config:
    """The config of the run in a folder, with the arguments of ``mmmilan.pretrain`` that are given this time.

    Args:
        folder: Folder of the run, with its ``config.py``.
        sources: Images to train on from now on; by default those of the run.
        changes: Other changes of the config.
        given: Only arguments that are given.

    Raises:
        InputError: there is no config, or an argument would make it another run.
    """
    config = run_config(folder)
    refuse_changes(config, folder, given)
    schedule = own_schedule(config)
    if 'teacher' in given:
        change_teacher(config, folder, given['teacher'])
    if 'seed' in given:
        config.randomness = dict(seed=given['seed'])
    change_images(config, sources, given.get('labelled'))
    for loader in (config.train_dataloader, config.test_dataloader):
        loader.batch_size = given.get('batch_size', loader.batch_size)
    config.train_cfg.max_epochs = given.get('epochs', config.train_cfg.max_epochs)
    if 'epochs' in given:
        drop_crops(config)  # for repeat_crops
    change_config(config, changes)
    if config.default_hooks.get('teacher_cache') is None:  # no crop is kept any more
        drop_crops(config)
    if schedule is not None:
        loader = config.train_dataloader
        num_images = count_images(loader.dataset.sources, loader.batch_size)
        use_schedule(config, num_images, loader.batch_size, schedule)
    return config


def keep_call(
    config: Config, command: str, given: Mapping[str, Any], changes: Mapping[str, Any], **others: Any
) -> None:
    """Keep in a config how its run was called, for its page; ``others`` are what a resumed run needs besides.

    A line that resumes a run is kept if it says more than that.

    Args:
        config: The config, changed in place.
        command: Name of the function.
        given: Its arguments that are given; ``data``, one or more, and ``out`` are typed without their names.
        changes: Of the config.
    """
    options, commands = dict(given), call_of(config)['commands']
    resume, data = options.pop('resume', False), options.pop('data', [])
    words = [*(data if isinstance(data, list) else [data]), *([options.pop('out')] if data else [])]
    line = typed(command, words, options, changes)
    if not commands or ((options.keys() - {'out'} or changes or words) and line not in commands):
        commands.append(f'{line} --resume' if resume else line)
    config[CALL] = call_of(config) | dict(commands=commands, **others)


def run_config(folder: Path) -> Config:
    """The config of the run in a folder: of its ``config.py``, or else of its newest checkpoint.

    Raises:
        InputError: there is none, or it could run code.
    """
    path = folder / 'config.py'
    if not path.is_file():
        return own_config(find_newest(folder), with_data=True)
    config = parse_config(read_text(path), str(path))
    check_foreign_config(config.to_dict(), str(path))
    return config


def refuse_changes(config: Config, folder: Path, given: dict[str, Any]) -> None:
    """Raise an :class:`InputError` if an argument names another encoder or start than that of a run."""
    backbone = config.model.backbone
    own = dict(
        arch=backbone.arch,
        img_size=pair(backbone.img_size),
        patch_size=backbone.patch_size,
        start=(backbone.get('init_cfg') or {}).get('checkpoint'),
    )
    if recipe := call_of(config).get('recipe'):
        own['recipe'] = recipe['name']
    asked = dict(given)
    if 'arch' in asked and arch_sizes(named_arch(asked['arch'])) == arch_sizes(backbone.arch):
        asked['arch'] = backbone.arch  # the same encoder by another name
    if 'img_size' in asked:
        asked['img_size'] = pair(asked['img_size'])
    if 'start' in asked:
        asked['start'] = absolute(asked['start'])
    keep_own(own, asked, folder)


def keep_own(own: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Raise an :class:`InputError` if an argument for a resumed run is not what the run has."""
    for name, value in own.items():
        if name in asked and asked[name] != value:
            raise InputError(
                f'The run in {folder} has {name}={value!r}, which a resumed run keeps; leave {name} out, or start a '
                'new run in another folder.'
            )


def change_teacher(config: Config, folder: Path, teacher: str | dict[str, Any]) -> None:
    """Take another teacher for the rest of a run.

    Raises:
        InputError: there is no such teacher, or its features have another width than those that the run predicts.
    """
    model = config.model
    grid = tuple(side // model.backbone.patch_size for side in pair(model.backbone.img_size))
    width = set_teacher(config, teacher, grid)
    if width != model.neck.predict_feature_dim:
        raise InputError(
            f'The run in {folder} predicts features of width {model.neck.predict_feature_dim}, the teacher {teacher} '
            f'has {width}; resume with the teacher of the run, or start a new run in another folder.'
        )


def change_images(
    config: Config, sources: Sequence[str | os.PathLike] | None, labelled: str | os.PathLike | None
) -> None:
    """Train and evaluate on other images from now on, as often as before."""
    evaluated, hook = config.test_dataloader.dataset.sources, part(config.custom_hooks, 'OnlineEvaluationHook')
    if sources is not None:
        set_data(config, sources)
    # images that were not labelled by the user for this purpose follow the data
    root = hook.dataset.get('data_root') if hook else None
    follows = sources is not None and (root is None or any(Path(root).is_relative_to(each) for each in evaluated))
    if hook and (labelled is not None or follows):
        hook.dataset = evaluation_images(config, sources or evaluated, labelled)


def set_data(config: Config, sources: Sequence[str | os.PathLike]) -> None:
    """Set the images of training and evaluation, as absolute paths; what was understood of the folders is logged."""
    print_log(describe(sources), logger='current')
    images = (
        (config.train_dataloader, training_sources(sources)),
        (config.test_dataloader, [evaluation_source(source) for source in sources]),
    )
    for loader, chosen in images:
        loader.dataset.update(type='mmmilan.ImageSources', sources=[absolute(source) for source in chosen])
        loader.dataset.pop('data_root', None)


def count_images(sources: Sequence[str | os.PathLike], batch_size: int | None) -> int:
    """The number of images of the sources to train on.

    Raises:
        InputError: they do not fill a batch.
    """
    num_images = len(list_images(sources))
    if batch_size is not None and batch_size > num_images:
        raise InputError(f'{count(num_images, "image")} cannot fill one batch of {batch_size}; lower batch_size.')
    return num_images


def absolute(path: str | os.PathLike) -> str:
    """The absolute path of a file or folder, so that a run does not depend on where it was started; else the name."""
    return os.path.abspath(os.path.expanduser(path)) if os.path.exists(os.path.expanduser(path)) else os.fspath(path)


def set_image_size(config: Config, img_size: tuple[int, int] | int) -> None:
    """Set the size of the crops in training and of the whole images in evaluation."""
    steps, (height, width) = config.test_dataloader.dataset.pipeline, pair(img_size)
    crop = part(config.train_dataloader.dataset.pipeline, 'LoadRandomResizedCrop')
    crop.scale = img_size
    if height == width:
        part(steps, 'ResizeEdge').scale = round(height * 256 / 224)
        part(steps, 'CenterCrop').crop_size = height
    else:
        crop.aspect_ratio_range = (3 / 4 * width / height, 4 / 3 * width / height)
        resize = dict(type='Resize', scale=(width, height), backend='pillow', interpolation='bicubic')
        config.test_dataloader.dataset.pipeline = [part(steps, 'LoadImage'), resize, part(steps, 'PackInputs')]


def part(parts: Sequence[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The first of the hooks, or steps of a pipeline, of this type; None if there is none."""
    return next((each for each in parts if type_name(each) == kind), None)


def evaluation_images(
    config: Config, sources: Sequence[str | os.PathLike], labelled: str | os.PathLike | None
) -> dict[str, Any]:
    """The data set on which the encoder is evaluated during training, with labels if there are any.

    Raises:
        InputError: ``labelled`` has no folders that name classes.
    """
    given = [labelled] if labelled is not None else sources
    root, classes = class_folders(evaluation_source(given[0])) if len(given) == 1 else ('', [])
    if labelled is not None and not classes:
        raise InputError(
            f'{labelled} has no folders that name classes; give a folder with one folder of images per class.'
        )
    dataset = dict(config.test_dataloader.dataset)
    if classes and (labelled is not None or len(list_images(root)) >= 5 * len(classes)):
        del dataset['sources']
        dataset.update(type='mmmilan.ImageFolder', data_root=absolute(root), with_label=True)
    return dataset


def default_batch_size(num_images: int, largest: Mapping[str, int] = BATCH_SIZE) -> int:
    """The number of images per step, if the user does not set it; ``largest`` is the most, by device."""
    return fit_batch_size(num_images, largest.get(get_device(), largest['cuda']))


def set_start(config: Config, start: str | None) -> None:
    """Set the initial weights of the encoder, found or downloaded at once, and the normalisation of its images.

    Raises:
        InputError: there are no such weights.
    """
    if start is not None:
        path = resolve_checkpoint(start)
        normalisation = normalisation_of(config_of(start, path, load_checkpoint_file(path)), start)
        config.model.data_preprocessor.update(normalisation)
        config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=absolute(start))


def config_of(start: str, path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint, of which nothing is built; {} if it has none.

    Args:
        start: What the user calls the checkpoint.
        path: Its file.
        content: What is in it.
    """
    try:
        if path.is_file():
            return config_within(path, content)[0].to_dict()
    except NoConfig:
        pass
    return read_config_file(zoo_models()[start].config).to_dict() if start in zoo_models() else {}


def normalisation_of(config: Mapping[str, Any], start: str) -> dict[str, Any]:
    """Mean and standard deviation of an encoder's images, if its config has them; the log says if they may be BGR."""
    preprocessor = (config.get('model') or {}).get('data_preprocessor') or {}
    found = {key: list(preprocessor[key]) for key in ('mean', 'std') if preprocessor.get(key) is not None}
    if found and not gives_rgb(preprocessor):
        warn(
            f'The data_preprocessor of {start} has no to_rgb: if it was trained on BGR images, fine-tune it by a '
            'config of your own, as here it sees RGB ones.'
        )
    return found


def check_size(img_size: tuple[int, int] | int, patch_size: int) -> None:
    """Raise an :class:`InputError` if an image is not a whole number of patches."""
    if any(side % patch_size for side in pair(img_size)):
        raise InputError(f'img_size={img_size} is not a multiple of patch_size={patch_size}; choose one that is.')


def set_model(
    config: Config, arch: str | dict, teacher: str | dict, img_size: tuple[int, int] | int, patch_size: int
) -> None:
    """Set encoder and teacher, and the sizes of decoder and target that follow from them.

    Raises:
        InputError: the image is not a whole number of patches, or the encoder or the teacher is unknown.
    """
    check_size(img_size, patch_size)
    model, grid = config.model, tuple(side // patch_size for side in pair(img_size))
    arch = named_arch(arch)
    model.backbone.update(arch=arch, img_size=img_size, patch_size=patch_size)
    width = arch_sizes(arch)['embed_dims']
    model.neck.update(num_patches=as_num_patches(grid), embed_dim=width)
    if width < model.neck.decoder_embed_dim:
        heads = max(heads for heads in range(1, max(1, width // 32) + 1) if width % heads == 0)
        model.neck.update(decoder_embed_dim=width, decoder_depth=4, decoder_num_heads=heads)
    model.neck.predict_feature_dim = set_teacher(config, teacher, grid)


def named_teacher(teacher: str | dict[str, Any]) -> dict[str, Any]:
    """:func:`teacher_config`, with the absolute path of a file of weights."""
    config = teacher_config(teacher)
    return config | (
        dict(pretrained=absolute(config['pretrained'])) if isinstance(config.get('pretrained'), str) else {}
    )


def replace_teacher(config: Config, teacher: str | dict[str, Any], name: str | os.PathLike) -> None:
    """Take another teacher in place of that of a trained model ``name``, such as its file in another folder.

    Raises:
        InputError: the model has no teacher, or there is no such teacher.
    """
    before = (config.model.get('head') or {}).get('teacher')
    if not before:
        raise InputError(f'{name} has no teacher; leave teacher out.')
    before, after = before if isinstance(before, dict) else {}, named_teacher(teacher)
    kept = {key: value for key, value in before.items() if key not in ('type', 'model', 'pretrained')}
    if after['type'] != before.get('type') or after.get('model', before.get('model')) != before.get('model'):
        kept = {key: value for key, value in kept.items() if key == 'input_size'}
    config.model.head.teacher = kept | after


def set_teacher(config: Config, teacher: str | dict[str, Any], grid: tuple[int, int]) -> int:
    """Set the teacher, with the encoder's grid of patches; returns the width of its features."""
    head = config.model.head
    head.teacher = named_teacher(teacher)
    built = build_teacher(head.teacher)  # downloads it if necessary
    if built.grid != grid:
        head.teacher.input_size = tuple(side * built.patch_size for side in grid)
    return built.feature_dim


def named_arch(arch: str | dict[str, Any]) -> str | dict[str, Any]:
    """What mmpretrain calls an arch that a user names; sizes as they are."""
    return ARCHS.get(arch, arch) if isinstance(arch, str) else dict(arch)


def set_schedule(config: Config, num_images: int, epochs: int | None) -> None:
    """Set length, warm-up and learning rate for this number of images, and how often to evaluate and save."""
    batch_size = config.train_dataloader.batch_size
    schedule = fit_schedule(num_images, batch_size, epochs, width_of(config))
    config.optim_wrapper.optimizer.lr = schedule.lr
    config.param_scheduler = schedule.param_scheduler()
    config.train_cfg.max_epochs = schedule.epochs
    config.default_hooks.checkpoint.interval = max(1, schedule.epochs // CHECKPOINTS)
    part(config.custom_hooks, 'OnlineEvaluationHook')['interval'] = max(1, round(schedule.epochs / EVALUATIONS))
    config.auto_scale_lr = dict(enable=False, base_batch_size=batch_size)  # the rate is that of this batch already
    print_log(
        f'{num_images} images in batches of {batch_size}: {count(schedule.epochs, "epoch")} of '
        f'{count(schedule.steps_per_epoch, "step")}, the first {schedule.warmup} for warm-up, '
        f'learning rate {schedule.lr:g}.',
        logger='current',
    )
