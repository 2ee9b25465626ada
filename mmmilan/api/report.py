"""A page that compares a pretrained encoder with its starting point, and says whether pretraining helped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmilan import arguments
from mmmilan.api.progress import progress
from mmmilan.arguments import checked
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from collections.abc import Callable

    import numpy as np
    from mmengine.config import Config
    from mmengine.model import BaseModel
    from torch import Tensor, nn

    from mmmilan.datasets.image_folder import ImageFolder
    from mmmilan.visualization.report_sections import Bank, Images

BATCH_SIZE = 64


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
) -> Path:
    """Write a page that says whether pretraining helped on your images.

    The page compares the class token of four encoders: the pretrained one, its starting point, random weights and the
    teacher. If folders name classes, it gives the accuracy of 20 nearest neighbours and of linear probes with 1 %, 10 %
    and all labels, with 95 % confidence intervals, beside that of the most frequent class, and one sentence that says
    whether pretraining helped. Without classes, it gives RankMe and shows nearest neighbours.

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

    Returns:
        The path of the page.

    Raises:
        InputError: there are too few images, ``train`` lacks a class, the checkpoint was not pretrained by MILAN, or
            the page must not or cannot be written there.

    Examples:
        >>> mmmilan.report('photos', 'runs/photos/milan.pth', 'runs/photos/report.html')
    """
    import torch
    from mmengine.registry import DefaultScope

    from mmmilan.api.devices import choose_device, device_name
    from mmmilan.api.models import get_model, read_config
    from mmmilan.datasets.image_folder import as_sources
    from mmmilan.files import check_output
    from mmmilan.visualization import report_sections as sections
    from mmmilan.visualization.page import PAPER_LINK, Page

    begin = time.monotonic()
    sources = as_sources(data)
    path = check_output(out, [checkpoint, *sources], endings=('.html',), overwrite=overwrite)
    config = read_config(checkpoint)
    if 'masking' not in config.model:
        raise InputError(f'{checkpoint} was not pretrained by MILAN; give the checkpoint of a pretraining.')
    device = choose_device(device)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        known = read_known(config, sources)
        images = read_images(config, sources, max_images, known)
        milan = get_model(checkpoint, pretrained=True, encoder_only=False, device=device, teacher=teacher)
        encoders = build_encoders(milan, config, device)
        normalise = milan.data_preprocessor
        features = extract(images.pixels.split(BATCH_SIZE), lambda batch: batch, normalise, encoders, 'images')
        bank = encode_bank(known, max_images, normalise, encoders) if known and images.labels is not None else None
    page = Page('What pretraining did', sections.introduction(images), PAPER_LINK)
    sections.add_scores(page, features, images, bank)
    sections.add_training(page, checkpoint, config)
    sections.add_neighbours(page, features, images)
    sections.add_pictures(page, milan, encoders, images)
    page.paragraph(f'mmmilan report {" ".join(map(os.fspath, sources))} {checkpoint} --out {out}', 'code')
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


def read_images(
    config: Config, sources: Sequence[str | os.PathLike], max_images: int, known: ImageFolder | None
) -> Images:
    """At most ``max_images`` images of the sources, with labels if the folders of a single source name classes.

    Args:
        config: Of the pretraining; its test pipeline reads the images.
        sources: Folders and tar shards.
        max_images: The most images.
        known: The labelled training split, whose classes number those of the images.

    Raises:
        InputError: there are too few images, or one is of a class that the training split lacks.
    """
    import numpy as np
    import torch
    from mmengine.registry import DATASETS

    from mmmilan.datasets.classes import class_names, locate, use_classes
    from mmmilan.datasets.splits import class_folders, evaluation_source
    from mmmilan.visualization.pictures import evenly_spaced
    from mmmilan.visualization.report_sections import QUERIES, Images

    sources = [os.fspath(evaluation_source(source)) for source in sources]
    names = ', '.join(sources)
    root, classes = class_folders(sources[0]) if len(sources) == 1 else ('', [])
    dataset = dict(type='mmmilan.ImageSources', sources=sources)
    if classes:
        dataset = dict(type='mmmilan.ImageFolder', data_root=os.fspath(root), with_label=True)
    dataset = DATASETS.build(dataset | dict(pipeline=config.test_dataloader.dataset.pipeline))
    if len(dataset) < 2 * QUERIES:
        raise InputError(f'{names} holds {len(dataset)} images; give at least {2 * QUERIES}.')
    if classes and known is not None:
        use_classes(dataset, class_names(known), locate(known))
    chosen = evenly_spaced(len(dataset), max_images)
    samples = [dataset[i] for i in progress(chosen, 'Reading images', hide_below=500)]
    labels = np.array([int(sample['data_samples'].gt_label) for sample in samples]) if classes else None
    classes = list(class_names(dataset))
    if labels is not None and known is None and np.bincount(labels, minlength=len(classes)).min() < 4:
        labels = None  # the probes test on three tenths of each class, which would be less than one image
    return Images(names, torch.stack([sample['inputs'] for sample in samples]), labels, classes)


def encode_bank(
    known: ImageFolder, max_images: int, normalise: nn.Module, encoders: dict[str, Callable[[Tensor], Tensor]]
) -> Bank:
    """Features and labels of at most ``max_images`` labelled training images."""
    import numpy as np
    import torch

    from mmmilan.visualization.pictures import evenly_spaced
    from mmmilan.visualization.report_sections import Bank

    chosen = evenly_spaced(len(known), max_images)
    labels: list[int] = []

    def read(indices: list[int]) -> Tensor:
        samples = [known[index] for index in indices]
        labels.extend(int(sample['data_samples'].gt_label) for sample in samples)
        return torch.stack([sample['inputs'] for sample in samples])

    batches = [chosen[start : start + BATCH_SIZE] for start in range(0, len(chosen), BATCH_SIZE)]
    features = extract(batches, read, normalise, encoders, 'labelled training images')
    return Bank(known.img_prefix, features, np.array(labels))


def build_encoders(milan: BaseModel, config: Config, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The encoders, from normalised images [B, 3, H, W] to class tokens [B, D], by their names on the page."""
    import torch

    from mmmilan.visualization.report_sections import OURS, RANDOM, START, TEACHER

    start = (config.model.backbone.get('init_cfg') or {}).get('checkpoint')
    encoders = {OURS: class_token(milan.backbone)}
    if start is not None:
        encoders[START] = class_token(fresh_backbone(config, start, device))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoders[RANDOM] = class_token(fresh_backbone(config, None, device))
    if milan.head.teacher is not None:
        encoders[TEACHER] = lambda images: milan.head.run_teacher(images)[0][:, 0]
    return encoders


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


def class_token(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """The class token of whole images, as a function; its attribute ``backbone`` is the backbone."""

    def encode(images: Tensor) -> Tensor:
        return backbone(images)[-1]

    encode.backbone = backbone
    return encode


def extract(
    batches: Collection[Any],
    read: Callable[[Any], Tensor],
    normalise: nn.Module,
    encoders: dict[str, Callable[[Tensor], Tensor]],
    what: str,
) -> dict[str, np.ndarray]:
    """Features [M, D], float32, by encoder.

    Args:
        batches: What ``read`` turns into images, uint8 [B, 3, H, W].
        read: Reads a batch.
        normalise: The model's data preprocessor.
        encoders: Functions from normalised images to features [B, D], by name.
        what: What the progress bar calls the images.
    """
    import numpy as np
    import torch

    features: dict[str, list] = {name: [] for name in encoders}
    for batch in progress(batches, f'Encoding {what}'):
        with torch.no_grad():
            inputs = normalise(dict(inputs=read(batch)), False)['inputs']
            for name, encode in encoders.items():
                features[name].append(encode(inputs).float().cpu().numpy())
    return {name: np.concatenate(rows) for name, rows in features.items()}
