"""What ``mmmilan.report`` measures on: images, labelled ones beside them, encoders, and the features of all."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from torch import Tensor, nn

from mmmilan.api.models import get_model, read_config
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.datasets.classes import class_names, locate, use_classes
from mmmilan.datasets.image_folder import ImageFolder
from mmmilan.datasets.splits import class_folders, evaluation_source, splits_of
from mmmilan.errors import InputError, count
from mmmilan.evaluation.features import class_and_mean, evenly_spaced, extract, join, split_tokens
from mmmilan.registry import MODELS
from mmmilan.visualization.report_sections import MEAN, OURS, QUERIES, RANDOM, START, TEACHER, Bank, Images


def read_known(config: Config, sources: Sequence[str | os.PathLike]) -> ImageFolder | None:
    """The training split of a single source as labelled images; None without splits, or if its folders name no classes.

    Raises:
        InputError: it holds no image.
    """
    splits = splits_of(sources[0]) if len(sources) == 1 else None
    if not splits or not splits.held_out:
        return None
    root = next((root for root, classes in map(class_folders, splits.train) if classes), None)
    if root is None:
        return None
    pipeline = config.test_dataloader.dataset.pipeline
    return DATASETS.build(
        dict(type='mmmilan.ImageFolder', data_root=os.fspath(root), with_label=True, pipeline=pipeline)
    )


def read_images(config: Config, sources: Sequence[str | os.PathLike], known: ImageFolder | None) -> ImageFolder:
    """The images of the sources, with labels if the folders of a single source name classes.

    Args:
        config: Of the pretraining; its test pipeline reads the images.
        sources: Folders and tar shards.
        known: The labelled training split, whose classes number those of the images.

    Raises:
        InputError: an image is of a class that the training split lacks.
    """
    sources = [os.fspath(evaluation_source(source)) for source in sources]
    root, classes = class_folders(sources[0]) if len(sources) == 1 else ('', [])
    dataset = dict(type='mmmilan.ImageSources', sources=sources)
    if classes:
        dataset = dict(type='mmmilan.ImageFolder', data_root=os.fspath(root), with_label=True)
    dataset = DATASETS.build(dataset | dict(pipeline=config.test_dataloader.dataset.pipeline))
    if classes and known is not None:
        use_classes(dataset, class_names(known), locate(known))
    return dataset


def encode_images(
    dataset: ImageFolder,
    max_images: int,
    milan: BaseModel,
    backbones: dict[str, nn.Module],
    known: ImageFolder | None,
) -> tuple[Images, dict[str, np.ndarray]]:
    """At most ``max_images`` images and their features by encoder.

    Raises:
        InputError: there are too few images.
    """
    names = ', '.join(map(os.fspath, getattr(dataset, 'sources', [dataset.data_root])))
    if len(dataset) < 2 * QUERIES:
        raise InputError(f'{names} holds {count(len(dataset), "image")}; give at least {2 * QUERIES}.')
    chosen = np.array(evenly_spaced(len(dataset), max_images))
    features = extract_features(dataset, chosen, milan, backbones, 'Encoding images')
    chosen, labels, classes = chosen[features.pop('position')], features.pop('label', None), list(class_names(dataset))
    if labels is not None and known is None and np.bincount(labels, minlength=len(classes)).min() < 4:
        labels = None  # the probes test on three tenths of each class, which would be less than one image
    return Images(names, dataset, chosen, labels, classes), features


def encode_bank(known: ImageFolder, max_images: int, milan: BaseModel, backbones: dict[str, nn.Module]) -> Bank:
    """Features and labels of at most ``max_images`` labelled training images."""
    chosen = evenly_spaced(len(known), max_images)
    features = extract_features(known, chosen, milan, backbones, 'Encoding labelled training images')
    features.pop('position')
    return Bank(known.img_prefix, features, features.pop('label'))


def encode_run(
    checkpoint: str,
    name: str,
    sources: Sequence[str | os.PathLike],
    images: Images,
    bank: Bank | None,
    max_images: int,
    device: str,
) -> dict[str, np.ndarray]:
    """Features of the same images by the encoder of another run, which reads them as its own config says.

    Those of the labelled images are added to ``bank``.

    Raises:
        InputError: an image can no longer be read.
    """
    config, model = read_config(checkpoint), get_model(checkpoint, device=device)
    known, encoders = read_known(config, sources), {name: model.backbone}
    dataset = read_images(config, sources, known)
    found = extract_features(dataset, images.indices, model, encoders, f'Encoding images, {name}')
    same = len(found.pop('position')) == len(images.indices)
    found.pop('label', None)
    if bank is not None:
        labelled = encode_bank(known, max_images, model, encoders)
        same = same and np.array_equal(labelled.labels, bank.labels)
        bank.features.update(labelled.features)
    if not same:
        raise InputError(f'Not all images could be read again for {checkpoint}; leave them as they are, and repeat.')
    return found


def extract_features(
    dataset: ImageFolder,
    indices: Sequence[int] | np.ndarray,
    milan: BaseModel,
    backbones: dict[str, nn.Module],
    description: str,
) -> dict[str, np.ndarray]:
    """Class and mean tokens [M, D] by the encoder's name on the page, and what ``extract`` adds."""

    def encode(images: Tensor) -> dict[str, Tensor]:
        tokens = {name: class_and_mean(backbone, images) for name, backbone in backbones.items()}
        if getattr(milan.head, 'teacher', None) is not None:
            tokens[TEACHER] = split_tokens(milan.head.teacher, milan.head.run_teacher(images)[0])
        return {
            f'{name}{suffix}': each[token]
            for name, each in tokens.items()
            for token, suffix in (('class_token', ''), ('mean_token', MEAN))
        }

    return join(extract(dataset, milan.data_preprocessor, encode, description, indices=indices))


def build_backbones(milan: BaseModel, config: Config, device: str) -> dict[str, nn.Module]:
    """The pretrained encoder, its start and one of random weights, by their names on the page."""
    start = (config.model.backbone.get('init_cfg') or {}).get('checkpoint')
    backbones = {OURS: milan.backbone}
    if start is not None:
        backbones[START] = fresh_backbone(config, start, device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbones[RANDOM] = fresh_backbone(config, None, device)
    return backbones


def fresh_backbone(config: Config, start: str | None, device: str) -> nn.Module:
    """The encoder before pretraining: from the checkpoint ``start``, or with random weights if that is None."""
    use_safe_loading()
    init_cfg = dict(type='Pretrained', checkpoint=start) if start else None
    backbone = MODELS.build({**config.model.backbone, 'init_cfg': init_cfg})
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)  # MMEngine logs some lines for every parameter
    try:
        backbone.init_weights()
    finally:
        logger.setLevel(level)
    backbone.eval()  # mmpretrain's backbones return None from it
    return backbone.to(device)
