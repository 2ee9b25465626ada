"""Find mistakes in what a config says of the data, before MMEngine reports them late and with a stack trace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from mmmilan.building import values_of
from mmmilan.components import type_name
from mmmilan.datasets.annotations import check_label_maps, has_masks
from mmmilan.datasets.classes import class_names, datasets_in, locate, read_class_names, use_classes
from mmmilan.datasets.listing import IMAGES, walk
from mmmilan.errors import InputError, count
from mmmilan.files import first_line
from mmmilan.workers import check_workers

LOADERS = dict(
    train=('train_dataloader', 'val_dataloader', 'val_evaluator'),
    test=('test_dataloader', 'test_evaluator', 'test_cfg'),  # test_cfg has the training images of k-NN
)
# What MMEngine's backends of the visualizer import when they first log something.
PACKAGES = dict(
    AimVisBackend='aim',
    ClearMLVisBackend='clearml',
    DVCLiveVisBackend='dvclive',
    MLflowVisBackend='mlflow',
    NeptuneVisBackend='neptune',
    TensorboardVisBackend='tensorboard',
    WandbVisBackend='wandb',
)
# What a loop needs; MMEngine wants all of them or none.
LOOPS = dict(
    train=('train_dataloader', 'train_cfg', 'optim_wrapper'),
    val=('val_dataloader', 'val_cfg', 'val_evaluator'),
    test=('test_dataloader', 'test_cfg', 'test_evaluator'),
)
# Data preprocessors of mmpretrain, its default first, and ours, which normalise if they are given a mean.
NORMALISING = ('ClsDataPreprocessor', 'SelfSupDataPreprocessor', 'PretrainingDataPreprocessor')
NORMALISING += ('CaptionDataPreprocessor', 'ClassificationDataPreprocessor')
# How the errors of an empty data set begin, in MMEngine and in mmpretrain.
EMPTY = ('need at least one array to concatenate', 'Found 0 files')


def check_loops(cfg: Config, task: str) -> None:
    """Check that what a run is told to do can take place: its loops are whole, and what asks for a validation has one.

    Args:
        cfg: The config.
        task: 'train' or 'test'.

    Raises:
        InputError: a part of a loop is missing, no validation takes place, images have no sampler or are not
            normalised, or nothing is saved.
    """
    lacking = {loop: [part for part in parts if cfg.get(part) is None] for loop, parts in LOOPS.items()}
    for loop, parts in lacking.items():
        if loop == task and len(parts) == 3 or 0 < len(parts) < 3:
            remedy = 'set it' if len(parts) == 1 else 'set them'
            remedy += f', or all of {", ".join(LOOPS[loop])} to None' if loop != task else ''
            raise InputError(f'The config has no {" and no ".join(parts)}, which the {loop} loop needs; {remedy}.')
    for loop in LOOPS:
        loader = cfg.get(f'{loop}_dataloader')
        if isinstance(loader, Mapping) and 'sampler' in loader and loader['sampler'] is None:
            raise InputError(
                f'{loop}_dataloader.sampler is None: images would not be shuffled, and each of several processes would '
                'take all; give it a type.'
            )
    if fault := lack_of_normalisation(cfg, task):
        raise InputError(
            f'{fault}: the model would get images as they are, from 0 to 255; give it a type, mean and std.'
        )
    default = cfg.get('default_hooks') or {}
    if task == 'train' and default.get('checkpoint', {}) is None:
        raise InputError('default_hooks.checkpoint is None: nothing of the run would be saved; leave that out.')
    hooks = [default.get('checkpoint'), *(cfg.get('custom_hooks') or [])]
    hooks = [hook for hook in hooks if isinstance(hook, Mapping)]
    asking = ['save_best of the checkpoint hook'] * any(hook.get('save_best') for hook in hooks)
    asking += ['EarlyStoppingHook'] * any(type_name(hook).endswith('EarlyStoppingHook') for hook in hooks)
    if task != 'train' or not asking:
        return
    loop = cfg.train_cfg
    begin, end = loop.get('val_begin', 1), loop.get('max_epochs', loop.get('max_iters'))
    if lacking['val'] or (end and begin > end):
        fault = (
            'the config has no val_dataloader' if lacking['val'] else f'train_cfg.val_begin={begin} is after the end'
        )
        raise InputError(f'{asking[0]} needs a validation, but {fault}; correct that, or leave it out.')


def lack_of_normalisation(cfg: Config, task: str) -> str:
    """What a data preprocessor lacks to normalise images, if no step of the pipeline does so; '' if nothing."""
    preprocessor, name = cfg.model.get('data_preprocessor'), 'model.data_preprocessor'
    loader = cfg.get(f'{task}_dataloader')
    if any('Normalize' in type_name(part) for _, part in _parts(loader, 'loader')):
        return ''
    if preprocessor is None:
        if 'data_preprocessor' in cfg.model:
            return f'{name} is None'
        return f'{name} is not set' if 'backbone' in cfg.model else ''  # of other models nobody knows what they do
    kind = type_name(preprocessor) if 'type' in preprocessor else NORMALISING[0]
    return f'{name} has no mean' if kind in NORMALISING and preprocessor.get('mean') is None else ''


def check_data(cfg: Config, task: str) -> None:
    """Check that the folders and annotation files of the data sets exist.

    Args:
        cfg: The config.
        task: 'train' or 'test'.

    Raises:
        InputError: one is missing; names it and the option that sets it.
    """
    for name in LOADERS[task]:
        for option, part in _parts(cfg.get(name), name):
            _check_part(option, part)


def _check_part(option: str, part: Mapping[str, Any]) -> None:
    root = part.get('data_root') or ''
    if not isinstance(root, str) or '://' in root or part.get('backend_args'):
        return  # not on a local disk
    if root and not os.path.isdir(root):
        raise InputError(f'The data folder {root} does not exist; set {option}.data_root to your data.')
    file = part.get('ann_file')
    if isinstance(file, str) and file and '://' not in file and not Path(root, file).is_file():
        raise InputError(f'The annotations {Path(root, file)} do not exist; set {option}.ann_file to them.')


def check_processes(cfg: Config, task: str) -> None:
    """Raise an :class:`InputError` if the data loaders of a task have workers, and this process can start none."""
    parts = [pair for name in LOADERS[task] for pair in values_of(cfg.get(name), name)]
    check_workers([name for name, value in parts if name.endswith('.num_workers') and value])


def check_is_not_read(folder: str | os.PathLike, cfg: Config) -> None:
    """Raise an :class:`InputError` if a folder that is written holds images that the data sets of a config read."""
    inside = Path(os.path.realpath(folder))
    for name in dict.fromkeys(name for names in LOADERS.values() for name in names):
        for option, part in _parts(cfg.get(name), name):
            roots = [part.get('data_root'), *(part.get('sources') or ())]
            roots = [root for root in roots if isinstance(root, str) and os.path.isdir(root)]
            if any(inside.is_relative_to(os.path.realpath(root)) for root in roots) and walk(folder, IMAGES).files:
                raise InputError(f'{folder} holds images that {option} reads; choose another folder to write in.')


def _parts(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict in a part of a config with its dotted name."""
    return (pair for pair in values_of(value, name) if isinstance(pair[1], Mapping))


def check_packages(cfg: Config) -> None:
    """Raise an :class:`InputError` if a backend of the visualizer logs to a package that is not installed."""
    for name in ('visualizer', 'vis_backends'):
        for option, part in _parts(cfg.get(name), name):
            kind = type_name(part)
            if kind in PACKAGES and find_spec(PACKAGES[kind]) is None:
                package = PACKAGES[kind]
                raise InputError(
                    f'{option} ({kind}) needs {package}, which is not installed; run `pip install {package}` or set '
                    f"{option}.type to 'LocalVisBackend'."
                )


def check_batches(runner: Runner) -> None:
    """Check that an epoch has a step, and that no batch has a single image where BatchNorm needs two.

    Raises:
        InputError: the images do not fill one batch, or a batch of one would meet a BatchNorm that has one value a
            channel to normalise.
    """
    loader = runner.train_dataloader
    batches = loader.batch_sampler
    size, images = getattr(batches, 'batch_size', None), len(loader.sampler)
    if len(loader) == 0:
        raise InputError(
            f'{count(len(loader.dataset), "training image")} cannot fill one batch of {size} on each of '
            f'{count(runner.world_size, "process")}; lower train_dataloader.batch_size.'
        )
    last = size and not getattr(batches, 'drop_last', False) and images % size == 1
    last = last and not isinstance(loader.sampler, InfiniteSampler) and runner.max_iters >= len(loader)
    if size != 1 and not last:
        return
    name = norm_of_images(runner.model, runner.world_size)
    if name and size == 1:
        raise InputError(
            f'train_dataloader.batch_size is 1, but {name} is a BatchNorm over the images of a batch; set '
            'train_dataloader.batch_size to 2 or more.'
        )
    if name:
        raise InputError(
            f'The last batch of an epoch has one image ({images} in batches of {size}), but {name} is a BatchNorm over '
            'the images of a batch; set train_dataloader.drop_last=True, or another train_dataloader.batch_size.'
        )


def norm_of_images(model: nn.Module, processes: int = 1) -> str:
    """The name of a BatchNorm with one value per image and channel; '' if there is none.

    That is a one-dimensional one of a neck or a head (those of a backbone see many tokens of an image), or one that
    follows pooling to 1 x 1. SyncBN of several processes has more than one image in any case.
    """
    pooled: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(part, nn.Sequential) and len(part) and getattr(part[0], 'output_size', None) in (1, (1, 1)):
            pooled.update(part.modules())
    for name, part in model.named_modules():
        if not isinstance(part, _BatchNorm) or (isinstance(part, nn.SyncBatchNorm) and processes > 1):
            continue
        flat = isinstance(part, nn.BatchNorm1d) and 'backbone' not in name.split('.')
        if flat or part in pooled:
            return name
    return ''


def use_boxes_alone(cfg: Config, task: str) -> str:
    """:func:`leave_out_masks`, if the annotations have boxes alone.

    Args:
        cfg: The config, changed in place.
        task: 'train' or 'test': whose annotations count.

    Returns:
        A sentence for the log; '' if nothing was changed.
    """
    head = cfg.model.get('roi_head')
    files = [
        Path(part.get('data_root') or '', part['ann_file'])
        for _, part in _parts(cfg.get(f'{task}_dataloader'), 'loader')
        if part.get('ann_file') and any(step.get('with_mask') for _, step in _parts(part.get('pipeline'), 'step'))
    ]
    files = [file for file in files if file.is_file()]
    if not isinstance(head, Mapping) or not head.get('mask_head') or not files or any(map(has_masks, files)):
        return ''
    leave_out_masks(cfg)
    return f'{files[0]} has boxes alone, no segmentation: the detector is trained and scored without its mask head.'


def leave_out_masks(cfg: Config) -> None:
    """Remove the mask head of a detector, and what loads and scores masks; the config is changed in place."""
    cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for _, part in _parts(cfg.get(loader), loader):
            if part.get('with_mask'):
                part['with_mask'] = False
    for evaluator in ('val_evaluator', 'test_evaluator'):
        for _, part in _parts(cfg.get(evaluator), evaluator):
            if isinstance(part.get('metric'), (list, tuple)):
                part['metric'] = [name for name in part['metric'] if name != 'segm']


def check_data_sets(runner: Runner) -> None:
    """Make a runner check the data sets that it builds, and number the classes of all as in the first, by name.

    The runner then raises an ``InputError`` for a data set that is empty or cannot be built, for label maps without
    labels, and for classes that the first data set (of training, or of k-NN's labelled images) lacks.
    """
    build, first, palettes = runner.build_dataloader, [], {}

    def build_checked(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        if isinstance(dataloader, DataLoader):
            return build(dataloader, *args, **kwargs)
        prepare(dataloader['dataset'])
        with data_set_errors(dataloader['dataset']):
            loader = build(dataloader, *args, **kwargs)
            if not len(loader.dataset):
                raise ValueError(EMPTY[0])
        for part in datasets_in(loader.dataset):
            check_label_maps(part, palettes)
        if not first and class_names(loader.dataset):
            leaf = next(part for part in datasets_in(loader.dataset) if not hasattr(part, 'datasets'))
            first.extend([class_names(loader.dataset), locate(leaf)])
        if first:  # also data sets that are joined to the first one
            use_classes(loader.dataset, *first)
        return loader

    runner.build_dataloader = build_checked


def prepare(dataset: Any) -> None:
    """Change the config of a data set: mmdet's of COCO to ours, and a file of class names to the names.

    Data sets that are joined may differ in their classes, which are matched by name later.
    """
    for _, part in _parts(dataset, 'dataset'):
        if type_name(part) == 'ConcatDataset':
            ignored = part.get('ignore_keys') or []
            part['ignore_keys'] = list({*([ignored] if isinstance(ignored, str) else ignored), 'classes'})
        if part.get('type') in ('CocoDataset', 'mmdet.CocoDataset'):  # numbers classes in the order of the file
            part['type'] = 'mmmilan.CocoDataset'
        metainfo = part.get('metainfo')
        if isinstance(metainfo, Mapping) and isinstance(metainfo.get('classes'), str):
            path = Path(metainfo['classes'])
            metainfo['classes'] = read_class_names(path if path.is_file() else Path(part.get('data_root') or '', path))


@contextmanager
def data_set_errors(dataset: Any) -> Iterator[None]:
    """Turn errors while a data set is built from its config ``dataset`` into an ``InputError``."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        message = first_line(error).partition('. ')[0]
        if isinstance(error, InputError):
            raise
        if message.startswith(EMPTY):
            fault = 'is empty'
        elif 'meta information of' in message:  # of data sets that MMEngine joins
            fault = 'joins data sets whose metainfo differs, such as their classes'
        elif isinstance(error, (AssertionError, OSError)):
            fault = f'cannot be loaded ({message})'
        else:
            raise
        raise InputError(f'The data set {_describe(dataset)} {fault}; correct its options or its files.') from error


def _describe(dataset: Any) -> str:
    """The type of a data set and the options that locate its files; for a wrapper, those of the wrapped data set."""
    parts = [part for _, part in _parts(dataset, 'dataset') if 'data_root' in part or 'ann_file' in part]
    if not parts:
        return 'of the config'
    options = {name: parts[0].get(name) for name in ('data_root', 'ann_file', 'data_prefix', 'split', 'filter_cfg')}
    return f'{parts[0].get("type")} ({", ".join(f"{name}={value!r}" for name, value in options.items() if value)})'
