"""The config of fine-tuning on a user's own labelled images: a published recipe, fitted to images and encoder."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from mmmilan.api.finetune_encoder import Encoder, encoder_of
from mmmilan.api.recipe import absolute, check_size, default_batch_size, keep_own, named_arch, part, run_config
from mmmilan.building import arch_sizes, require_operators
from mmmilan.checkpoints.config import CALL, call_of, read_config_file
from mmmilan.checkpoints.task_config import config_task
from mmmilan.checkpoints.zoo import find_model
from mmmilan.datasets.labelled import Labelled, image_paths, read_labelled
from mmmilan.datasets.object_formats import size_of
from mmmilan.datasets.split_file import labelled_datasets, read_split
from mmmilan.engine.config_check import leave_out_masks
from mmmilan.errors import InputError, count, listed
from mmmilan.teachers.base import pair
from mmmilan.visualization.pictures import class_colours
from mmmilan.workers import default_workers

ZOO = dict(
    classification='vit-base-p16_milan-pre_8xb128-coslr-100e_in1k',
    detection='mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco',
    segmentation='upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512',
)
METRICS = dict(classification='accuracy/top1', detection='coco/bbox_mAP', segmentation='mIoU')
WIDTH = 128  # of the encoder with which dense tasks were measured
PROBE_RATE = 1e-4  # of a classifier's head alone, which begins as a linear probe
ENOUGH_FOR_BN = 8  # images; measured in docs/own_images.md
SMALL = 64  # pixels; of smaller images a border is no margin
LARGEST = dict(detection=1024, segmentation=512)  # pixels, of the published recipes
OF_A_WORKER = 50  # images at least: data workers take seconds to start and to end


class Recipe(NamedTuple):
    """What was measured on small data (docs/own_images.md), by task.

    Attributes:
        lr: Rate of the head for a batch of ``batch`` and, if dense, an encoder of width ``WIDTH``; with the
            square root of the batch size, and inverse to the width.
        layer_decay: Of the rate, from block to block towards the input.
        batch: Batch size of the rate.
        largest: Batch size at most, by device.
        steps: Length of a run by device, within ``epochs``; on a CPU what takes minutes with a small model.
        epochs: The least and the most.
    """

    lr: float
    layer_decay: float
    batch: int
    largest: dict[str, int]
    steps: dict[str, int]
    epochs: tuple[int, int]


RECIPES = dict(
    classification=Recipe(1e-3, 0.65, 32, dict(cuda=128, cpu=32), dict(cuda=2000, cpu=300), (10, 100)),
    detection=Recipe(1e-3, 0.75, 8, dict(cuda=4, cpu=8), dict(cuda=4000, cpu=400), (12, 100)),
    segmentation=Recipe(5e-3, 0.75, 8, dict(cuda=8, cpu=8), dict(cuda=4000, cpu=600), (15, 200)),
)


def new_config(
    folder: Path,
    of_data: Mapping[str, Any],
    start: str | None = None,
    arch: str | dict[str, Any] | None = None,
    patch_size: int | None = None,
    img_size: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    lr: float | None = None,
    freeze: bool = False,
    patience: int | None = None,
    processes: int = 1,
    seed: int = 0,
) -> tuple[Config, Labelled]:
    """The config of a new run, and the data that it reads once they are written; arguments of ``mmmilan.finetune``.

    Args:
        folder: Where :func:`mmmilan.datasets.split_file.write_labelled` will write the data.
        of_data: What tells the data: arguments of :func:`mmmilan.datasets.labelled.read_labelled`.
        processes: Number of processes that train together.

    Raises:
        InputError: an argument is wrong, or two do not fit.
    """
    if freeze and start is None:
        raise InputError('freeze trains the head of random weights; give a start, or leave out freeze.')
    labelled = read_labelled(**of_data, seed=seed)
    say(labelled)
    encoder = encoder_of(start, arch, patch_size)
    config = base_config(labelled.task)
    side = img_size or default_size(labelled, encoder)
    check_size(side, encoder.patch_size)
    config.runner_type = 'mmmilan.ConsoleRunner'
    config.randomness = dict(seed=seed)
    set_encoder(config, encoder, start, side, freeze)
    FIT[labelled.task](config, labelled, encoder, side)
    num_images = len(image_paths(labelled.train))
    batch_size = batch_size or default_batch_size(num_images, RECIPES[labelled.task].largest)
    batches = Batches(num_images, batch_size, accumulate, processes)
    if labelled.task == 'detection':
        set_norm(config, batches)
    set_schedule(config, labelled.task, batches, epochs, lr, freeze)
    if not freeze:
        config.optim_wrapper.paramwise_cfg.layer_decay_rate = layer_decay(labelled.task, start is not None)
    set_hooks(config, METRICS[labelled.task], patience)
    datasets = labelled_datasets(labelled, folder)
    if labelled.task != 'classification':  # the inferencers of mmdet and mmseg draw in the colours of the checkpoint
        for each in datasets.values():
            each['metainfo'] |= dict(palette=[list(colour) for colour in class_colours(len(labelled.classes))])
    set_loaders(config, batches, len(image_paths(labelled.val)), datasets)
    return config, labelled


def resumed_config(
    folder: Path, of_data: Mapping[str, Any], epochs: int | None = None, processes: int = 1, **given: Any
) -> tuple[Config, Labelled | None]:
    """The config of the run in a folder, and the data if they are given again.

    Of other arguments of ``mmmilan.finetune``, only ``epochs`` may differ.

    Raises:
        InputError: there is no config, an argument is not that of the run, or its images have changed.
    """
    config, split = run_config(folder), read_split(folder / 'split.json')
    backbone, loader, optimizer = config.model.backbone, config.train_dataloader, config.optim_wrapper.optimizer
    own = dict(
        start=(backbone.init_cfg or {}).get('checkpoint'),
        arch=backbone.arch,
        patch_size=backbone.patch_size,
        img_size=backbone.img_size,
        batch_size=loader.batch_size,
        accumulate=config.optim_wrapper.get('accumulative_counts', 1),
        lr=optimizer.lr,
        freeze=backbone.get('frozen_stages', -1) > 0,
        patience=(part(config.custom_hooks, 'EarlyStoppingHook') or {}).get('patience'),
        seed=config.randomness.seed,
    )
    asked = dict(given)
    if 'arch' in asked:
        asked['arch'] = arch_sizes(named_arch(asked['arch']))
    if 'start' in asked:
        asked['start'] = absolute(asked['start'])
    keep_own(own, asked, folder)
    labelled = None
    if of_data:
        labelled = read_labelled(**dict(data=split['data'], task=split['task']) | dict(of_data), seed=own['seed'])
    if epochs is not None and epochs != config.train_cfg.max_epochs:
        batches = Batches(len(split['train']), loader.batch_size, own['accumulate'], processes)
        config.train_cfg.max_epochs = epochs
        config.param_scheduler = schedule(epochs, batches.per_epoch)
    return config, labelled


def compared_with(config: Config, folder: Path, given: str | os.PathLike | None) -> str | None:
    """The start that a run is compared with: what is given, or what a resumed run kept; None for no comparison.

    Raises:
        InputError: the run in ``folder`` is compared with another.
    """
    own, asked = call_of(config).get('compare'), given if given in (None, 'scratch') else absolute(given)
    if own is not None and asked is not None:
        keep_own(dict(compare=own), dict(compare=asked), folder)
    return own or asked


def compared_config(config: Config, start: str) -> Config:
    """The config of the same training from another start, or from random weights ('scratch').

    The decay of the rate is what suits random weights, see :func:`layer_decay`; all else is the same.

    Raises:
        InputError: it is not an encoder of the same shape, or random weights would be compared with themselves, or
            frozen.
    """
    second = copy.deepcopy(config)
    second.pop(CALL, None)  # it is not called by itself
    backbone, task, random = second.model.backbone, config_task(config), start == 'scratch'
    if random and not backbone.init_cfg:
        raise InputError("compare='scratch' compares random weights with themselves; give a start, or another compare.")
    if random and backbone.get('frozen_stages', -1) > 0:
        raise InputError(
            "compare='scratch' would train a head on frozen random weights, which tells nothing of pretraining; leave "
            'out freeze or compare.'
        )
    rates = second.optim_wrapper.get('paramwise_cfg') or {}  # none of a head alone
    if rates.get('layer_decay_rate') == layer_decay(task, bool(backbone.init_cfg)):  # else the user's
        rates.layer_decay_rate = layer_decay(task, not random)
    if task == 'classification':  # its head begins as published, or as the probe of its own start
        published = base_config('classification').model
        backbone.update(out_type=published.backbone.out_type, final_norm=published.backbone.final_norm)
        second.model.head.init_cfg = published.head.init_cfg
    if random:
        backbone.init_cfg = None
    else:
        encoder_of(start, dict(backbone.arch), backbone.patch_size)
        backbone.init_cfg = dict(type='Pretrained', checkpoint=absolute(start))
    return second


def say(labelled: Labelled) -> None:
    """Log what was understood of the data."""
    train, val = len(image_paths(labelled.train)), len(image_paths(labelled.val))
    sizes = f'{count(train, "image")} to train on and {val} to validate on'
    names = f'{count(len(labelled.classes), "class")} ({listed(labelled.classes)})'
    for line in (f'{labelled.root}: {labelled.task}, {names}, {sizes}.', *labelled.notes):
        print_log(line, logger='current')


def layer_decay(task: str, pretrained: bool) -> float:
    """The decay of the rate from block to block; see docs/own_images.md for what suits random weights."""
    return 1.0 if task == 'classification' and not pretrained else RECIPES[task].layer_decay


class Batches(NamedTuple):
    """How images become steps.

    Attributes:
        images: Number of training images.
        size: Images that a process sees at once.
        accumulate: Batches of each process that make a step of the optimizer.
        processes: Number of processes.
    """

    images: int
    size: int
    accumulate: int
    processes: int

    @property
    def per_epoch(self) -> int:
        """Batches of each process in an epoch: of whole steps."""
        return max(1, self.images // self.of_a_step) * self.accumulate

    @property
    def of_a_step(self) -> int:
        """Images of a step of the optimizer."""
        return self.size * self.accumulate * self.processes


def base_config(task: str) -> Config:
    """The published config of a task."""
    if task != 'classification':
        require_operators()
    return read_config_file(find_model(ZOO[task]).config)


def default_size(labelled: Labelled, encoder: Encoder) -> int:
    """The size of the images that the model sees: the encoder's for a classifier, else about that of the images.

    For a detector that is their median long side, for a segmentor the short one, in whole cells of the coarsest map.
    """
    if labelled.task == 'classification':
        return max(pair(encoder.img_size))
    cell, largest = 2 * encoder.patch_size, LARGEST[labelled.task]
    if labelled.task == 'detection':
        sides = [max(image['width'], image['height']) for image in labelled.train['images']]
    else:
        sizes = [size_of(record['img_path']) for record in labelled.train[:100]]
        sides = [min(size) for size in sizes if size] or [largest]
    return min(largest // cell * cell, max(2, round(float(np.median(sides)) / cell)) * cell)


def set_encoder(config: Config, encoder: Encoder, start: str | None, side: int, freeze: bool) -> None:
    """Set the shape of the encoder, its start, and the normalisation of its images."""
    backbone = config.model.backbone
    backbone.update(arch=encoder.arch, img_size=side, patch_size=encoder.patch_size)
    backbone.init_cfg = None if start is None else dict(type='Pretrained', checkpoint=absolute(start))
    config.model.data_preprocessor.update(encoder.normalisation)
    if freeze:
        backbone.update(frozen_stages=encoder.arch['num_layers'], drop_path_rate=0.0)
        if 'sincos_pos_embed' in backbone:  # which frozen blocks cannot learn
            backbone.sincos_pos_embed = False


def fit_classifier(config: Config, labelled: Labelled, encoder: Encoder, side: int) -> None:
    """Fit head, augmentation and evaluation of a classifier to classes and size."""
    model, width, classes = config.model, encoder.arch['embed_dims'], len(labelled.classes)
    model.data_preprocessor.num_classes = classes
    model.head.update(num_classes=classes, in_channels=width)
    model.train_cfg = None  # no mixing: see docs/own_images.md
    steps = config.train_dataloader.dataset.pipeline
    part(steps, 'LoadRandomResizedCrop').update(scale=side, crop_ratio_range=(0.6, 1.0))
    config.train_dataloader.dataset.pipeline = [
        step for step in steps if step['type'] not in ('RandAugment', 'RandomErasing')
    ]
    steps = config.val_dataloader.dataset.pipeline
    part(steps, 'ResizeEdge').scale = round(side * 256 / 224) if side > SMALL else side
    part(steps, 'CenterCrop').crop_size = side
    config.val_evaluator.topk = config.test_evaluator.topk = (1, min(5, classes))


def fit_detector(config: Config, labelled: Labelled, encoder: Encoder, side: int) -> None:
    """Fit Mask R-CNN to encoder, size and classes: Faster R-CNN where objects have no masks.

    The published sizes are those of ViT-B at 1024 pixels with patches of 16; a narrower encoder has narrower heads, a
    smaller grid fewer proposals.
    """
    model, patch, width = config.model, encoder.patch_size, encoder.arch['embed_dims']
    classes, grid, channels = len(labelled.classes), side // patch, head_width(width)
    strides = [patch * scale / 4 if patch % 4 else patch * scale // 4 for scale in (1, 2, 4, 8, 16)]
    share = min(1.0, (grid / 64) ** 2)  # of the places
    proposals = dict(nms_pre=max(200, round(2000 * share)), max_per_img=max(100, round(1000 * share)))
    rois = dict(out_channels=channels, featmap_strides=strides[:4], finest_scale=56 * patch / 16)
    head = dict(in_channels=channels, conv_out_channels=channels, num_classes=classes, norm_cfg=norm_of(channels))
    blocks = quarters(encoder.arch['num_layers'])
    model.backbone.update(out_indices=blocks, global_indices=blocks, window_size=16 if grid > 16 else 0)
    if width % 32:
        model.backbone.scale_norm_cfg = norm_of(width)
    model.data_preprocessor.pad_size_divisor = side
    changes = dict(
        neck=dict(in_channels=[width] * 4, out_channels=channels, norm_cfg=norm_of(channels)),
        rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(strides=strides)),
        roi_head=dict(
            bbox_roi_extractor=rois,
            bbox_head=head | dict(fc_out_channels=4 * channels),
            mask_roi_extractor=rois,
            mask_head=head,
        ),
        train_cfg=dict(
            rpn=dict(sampler=dict(num=max(64, round(256 * share)))),
            rpn_proposal=proposals,
            rcnn=dict(sampler=dict(num=max(32, round(512 * share)))),
        ),
        test_cfg=dict(rpn=proposals | dict(nms_pre=max(200, round(1000 * share)))),
    )
    config.merge_from_dict(dict(model=changes))
    if not labelled.has_masks:
        leave_out_masks(config)
    part(config.train_dataloader.dataset.pipeline, 'RandomResize').ratio_range = (0.5, 1.5)
    fit_dense_pipelines(config, (side, side), side)


def fit_segmentor(config: Config, labelled: Labelled, encoder: Encoder, side: int) -> None:
    """Fit UperNet to encoder, size and classes."""
    model, width, classes = config.model, encoder.arch['embed_dims'], len(labelled.classes)
    depth = encoder.arch['num_layers']
    blocks = [max(0, round(depth * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 1)]
    model.backbone.update(out_indices=blocks, scale_norm_cfg=norm_of(width))
    model.data_preprocessor.size = (side, side)
    channels = width if width >= 768 else head_width(width)
    for head, number in ((model.decode_head, channels), (model.auxiliary_head, min(256, channels))):
        head.update(num_classes=classes, channels=number, norm_cfg=norm_of(number))
    model.decode_head.in_channels, model.auxiliary_head.in_channels = [width] * 4, width
    model.test_cfg = dict(mode='slide', crop_size=(side, side), stride=(max(1, side * 2 // 3),) * 2)
    for loader in (config.train_dataloader, config.val_dataloader):
        part(loader.dataset.pipeline, 'LoadLabelMap').num_classes = classes
    fit_dense_pipelines(config, (4 * side, side), side)
    config.pop('log_processor')


def fit_dense_pipelines(config: Config, scale: tuple[int, int], side: int) -> None:
    """Set the sizes of images and crops; small images keep their own size and colours, see docs/own_images.md."""
    for loader in (config.train_dataloader, config.val_dataloader):
        for step in loader.dataset.pipeline:
            if step['type'] in ('Resize', 'RandomResize'):
                step.scale = scale
            elif step['type'] == 'RandomCrop':
                step.crop_size = (side, side)
    if side <= SMALL:
        steps = config.train_dataloader.dataset.pipeline
        part(steps, 'RandomResize').ratio_range = (1.0, 1.0)
        config.train_dataloader.dataset.pipeline = [step for step in steps if step['type'] != 'PhotoMetricDistortion']


def quarters(depth: int) -> list[int]:
    """The last block of each quarter, from 0."""
    return [max(0, depth * number // 4 - 1) for number in (1, 2, 3, 4)]


def norm_of(channels: int) -> dict[str, Any]:
    """GroupNorm, which takes any batch on any device; why not another norm: docs/own_images.md."""
    return dict(type='GN', num_groups=math.gcd(channels, 8))


def set_norm(config: Config, batches: Batches) -> None:
    """Give a detector the published BatchNorm in FPN and heads where enough images share it, of all GPUs together."""
    shared = get_device() == 'cuda' and batches.processes > 1
    if batches.size * (batches.processes if shared else 1) < ENOUGH_FOR_BN:
        return
    heads = config.model.roi_head
    for owner in filter(None, (config.model.neck, heads.bbox_head, heads.mask_head)):
        owner.norm_cfg = dict(type='BN')
    if shared:
        config.sync_bn = 'torch'


def head_width(width: int) -> int:
    """Channels of the heads: those published, 256, for ViT-B, and half an encoder's width for narrower ones."""
    return min(256, max(32, width // 2))


FIT = dict(classification=fit_classifier, detection=fit_detector, segmentation=fit_segmentor)


def set_loaders(config: Config, batches: Batches, num_val: int, datasets: Mapping[str, dict]) -> None:
    """Set data sets and batches; the pipelines stay."""
    if batches.of_a_step > batches.images:
        size = (
            f'batch of {batches.size}' if batches.of_a_step == batches.size else f'step of {batches.of_a_step} images'
        )
        remedy = 'batch_size' if batches.accumulate == 1 else 'batch_size or accumulate'
        raise InputError(f'{count(batches.images, "image")} cannot fill one {size}; lower {remedy}.')
    train, val = config.train_dataloader, config.val_dataloader
    for loader, name, images in ((train, 'train', batches.images), (val, 'val', num_val)):
        loader.dataset = dict(datasets[name], pipeline=loader.dataset.pipeline)
        loader.num_workers = min(default_workers(loader.num_workers), images // OF_A_WORKER)
        loader.persistent_workers = loader.num_workers > 0
    train.sampler = dict(type='mmmilan.ReproducibleSampler', shuffle=True)
    train.update(batch_size=batches.size, drop_last=True, pin_memory=get_device() == 'cuda')
    if batches.accumulate > 1:  # or the gradients of the last batches would be lost where a run is resumed
        train.batch_sampler = dict(type='mmmilan.WholeSteps', batches=batches.accumulate)
        train.drop_last = False  # PyTorch allows it with batch_size alone
    if val.batch_size > 1:
        val.batch_size = batches.size
    config.test_dataloader = val
    for evaluator in (config.val_evaluator, config.test_evaluator):
        if 'ann_file' in evaluator:
            evaluator.ann_file = datasets['val']['ann_file']


def set_schedule(
    config: Config, task: str, batches: Batches, epochs: int | None, lr: float | None, freeze: bool
) -> None:
    """Set length, warm-up and rates for this number of images.

    Args:
        config: The config, changed in place.
        task: Whose recipe it is.
        batches: Images and batches.
        epochs: Passes over the images; None for about as many steps as the recipe says.
        lr: Rate of the head; None for that of the recipe at this batch size.
        freeze: Whether the head is trained alone.
    """
    recipe, steps = RECIPES[task], batches.per_epoch // batches.accumulate
    if epochs is None:
        wanted = recipe.steps.get(get_device(), recipe.steps['cuda'])
        epochs = min(max(math.ceil(wanted / steps), recipe.epochs[0]), recipe.epochs[1])
    if freeze:
        config.optim_wrapper = dict(
            type=config.optim_wrapper.type, optimizer=dict(type='AdamW', weight_decay=0.0, fused=True)
        )
    wrapper = config.optim_wrapper
    rate = PROBE_RATE if freeze and task == 'classification' else recipe.lr
    if task != 'classification':
        rate *= WIDTH / config.model.backbone.arch['embed_dims']
    wrapper.optimizer.lr = lr or float(f'{rate * math.sqrt(batches.of_a_step / recipe.batch):.2g}')
    if batches.accumulate > 1:
        wrapper.accumulative_counts = batches.accumulate
    if get_device() == 'cpu':
        wrapper.type = 'OptimWrapper'  # in float32
    config.auto_scale_lr.enable = False  # the rate is already that of this batch size
    config.param_scheduler = schedule(epochs, batches.per_epoch)
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
    print_log(
        f'{count(batches.images, "image")} in batches of {batches.of_a_step}: {count(epochs, "epoch")} of '
        f'{count(steps, "step")}, learning rate {wrapper.optimizer.lr:g} of the head.',
        logger='current',
    )


def schedule(epochs: int, steps: int) -> list[dict]:
    """MMEngine's config: a tenth for warm-up, then cosine to 0, updated at each of the ``steps`` of an epoch."""
    warmup = max(2 / steps, 0.1 * epochs)  # in epochs; MMEngine's warm-up of one step never ends
    return [
        dict(type='LinearLR', start_factor=1e-4, end=warmup, convert_to_iter_based=True),
        dict(
            type='CosineAnnealingLR',
            T_max=max(epochs - warmup, 1 / steps),
            begin=warmup,
            end=max(epochs, warmup + 1 / steps),
            convert_to_iter_based=True,
        ),
    ]


def set_hooks(config: Config, metric: str, patience: int | None) -> None:
    """Keep the best checkpoint and the last one; stop early if asked; TensorBoard if it is installed."""
    hooks = config.default_hooks
    hooks.logger.update(interval=50, log_metric_by_epoch=True)
    hooks.checkpoint.update(interval=1, max_keep_ckpts=1, by_epoch=True, save_best=metric, rule='greater')
    if patience is not None:
        config.custom_hooks.append(
            dict(type='mmmilan.EarlyStoppingHook', monitor=metric, rule='greater', min_delta=1e-6, patience=patience)
        )
    if find_spec('tensorboard') is None:
        backends = config.visualizer.vis_backends
        config.visualizer.vis_backends = [each for each in backends if each['type'] != 'TensorboardVisBackend']
