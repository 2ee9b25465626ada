"""A page that compares a pretrained encoder with its starting point, and says whether pretraining helped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan import arguments
from mmmilan.arguments import checked
from mmmilan.errors import InputError, count

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from mmengine.config import Config
    from mmengine.model import BaseModel
    from torch import Tensor, nn

    from mmmilan.datasets.image_folder import ImageFolder
    from mmmilan.visualization.report_sections import Bank, Images


@checked
def report(
    data: arguments.Paths,
    checkpoint: arguments.Path,
    out: arguments.Path = 'report.html',
    *,
    max_images: arguments.Count = 2000,
    device: arguments.Device | None = None,
    overwrite: bool = False,
    teacher: arguments.Path | None = None,
    compare: arguments.Paths | None = None,
) -> Path:
    """Write a page that says whether pretraining helped on your images.

    The page compares encoders, by their class token and by the mean of their patch tokens: the pretrained one, its
    starting point if it had one, random weights and the teacher. If folders name classes, it gives the accuracy of 20
    nearest neighbours and of linear probes with 1 %, 10 % and all labels, with 95 % confidence intervals, beside that
    of the most frequent class, and one sentence that says whether pretraining helped. Without classes, it gives RankMe
    and shows nearest neighbours.

    Args:
        data: folders of images and tar shards that were not trained on, best one folder with a folder for each class.
            If a folder is divided into splits, ``val`` is taken, or else ``test``, and neighbours and probes learn from
            the labelled images of ``train``; otherwise from seven tenths of the images.
        checkpoint: a checkpoint of ``mmmilan.pretrain`` or ``mmmilan.train``, with its decoder.
        out: the page to write, a single self-contained file, .html.
        max_images: maximum number of images of a split; if there are more, evenly spaced ones are taken.
        device: where to run, by default on the GPU if there is one.
        overwrite: replace the page if there is one.
        teacher: the teacher, if it is not where the checkpoint says: a name or a file, as for ``mmmilan.pretrain``.
        compare: checkpoints of other runs, whose encoders are measured on the same images. Files of one name are told
            apart by their folders.

    Returns:
        The path of the page.

    Raises:
        InputError: there are too few images, ``train`` lacks a class, the checkpoint was not pretrained by MILAN, a run
            is named twice, or the page must not or cannot be written there.

    Examples:
        >>> mmmilan.report('photos', 'runs/photos/milan.pth', 'runs/photos/report.html')
    """
    import torch
    from mmengine.registry import DefaultScope

    from mmmilan.api.models import get_model, read_config, titles_of
    from mmmilan.api.recipe import about_recipe
    from mmmilan.arguments import typed
    from mmmilan.checkpoints.config import call_of
    from mmmilan.datasets.image_folder import as_sources
    from mmmilan.datasets.listing import listed_once
    from mmmilan.evaluation.features import choose_device, device_name
    from mmmilan.files import check_output
    from mmmilan.visualization import report_sections as sections
    from mmmilan.visualization.page import PAPER_LINK, Page

    begin = time.monotonic()
    sources = as_sources(data)
    runs = [os.fspath(each) for each in (checkpoint, *(as_sources(compare) if compare is not None else ()))]
    titles = titles_of(runs)
    path = check_output(out, [*runs, *sources], endings=('.html',), overwrite=overwrite)
    config = read_config(checkpoint)
    if 'masking' not in config.model:
        raise InputError(f'{checkpoint} was not pretrained by MILAN; give the checkpoint of a pretraining.')
    device = choose_device(device)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        with listed_once():
            known = read_known(config, sources)
            dataset = read_images(config, sources, known)
        milan = get_model(checkpoint, pretrained=True, encoder_only=False, device=device, teacher=teacher)
        backbones = build_backbones(milan, config, device)
        images, features = encode_images(dataset, max_images, milan, backbones, known)
        bank = encode_bank(known, max_images, milan, backbones) if known and images.labels is not None else None
        others = dict(zip([f'{sections.OURS}: {title}' for title in titles[1:]], runs[1:], strict=True))
        for name, run in others.items():
            features |= encode_run(run, name, sources, images, bank, max_images, device)
    page = Page('What pretraining did', sections.introduction(images, titles[0] if others else ''), PAPER_LINK)
    sections.add_scores(page, features, images, bank)
    sections.add_training(page, checkpoint, config, about_recipe(config))
    sections.add_neighbours(page, features, images)
    sections.add_pictures(page, milan, backbones, images)
    compared = dict(out=out, compare=runs[1:] or None)
    for line in (*call_of(config)['commands'], typed('report', [*sources, checkpoint], compared, {})):
        page.paragraph(line, 'code')
    minutes = (time.monotonic() - begin) / 60
    page.write(path, f'Made in {minutes:.1f} minutes on {device_name(device)}, PyTorch {torch.__version__}.')
    return path


def read_known(config: Config, sources: Sequence[str | os.PathLike]) -> ImageFolder | None:
    """The training split of a single source as labelled images; None without splits, or if its folders name no classes.

    Raises:
        InputError: it holds no image.
    """
    from mmengine.registry import DATASETS

    from mmmilan.datasets.splits import class_folders, splits_of

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
    from mmengine.registry import DATASETS

    from mmmilan.datasets.classes import class_names, locate, use_classes
    from mmmilan.datasets.splits import class_folders, evaluation_source

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
    import numpy as np

    from mmmilan.datasets.classes import class_names
    from mmmilan.evaluation.features import evenly_spaced
    from mmmilan.visualization.report_sections import QUERIES, Images

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
    from mmmilan.evaluation.features import evenly_spaced
    from mmmilan.visualization.report_sections import Bank

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
    import numpy as np

    from mmmilan.api.models import get_model, read_config

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
    from mmmilan.evaluation.features import class_and_mean, extract, join, split_tokens
    from mmmilan.visualization.report_sections import MEAN, TEACHER

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
    import torch

    from mmmilan.visualization.report_sections import OURS, RANDOM, START

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
    from mmengine.logging import MMLogger

    from mmmilan.checkpoints.loading import use_safe_loading
    from mmmilan.registry import MODELS

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
