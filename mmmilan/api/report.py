"""A page that compares a pretrained encoder with its starting point, and says whether pretraining helped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan.api.progress import progress
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from collections.abc import Callable

    import numpy as np
    from mmengine.config import Config
    from mmengine.model import BaseModel
    from torch import Tensor, nn

    from mmmilan.visualization.report_sections import Images

BATCH_SIZE = 64


def report(
    checkpoint: str | os.PathLike,
    data: Sequence[str | os.PathLike] | str | os.PathLike,
    out: str | os.PathLike = 'report.html',
    *,
    max_images: int = 2000,
    device: str | None = None,
) -> Path:
    """Write a page that says whether pretraining helped on your images.

    The page compares the class token of four encoders: the pretrained one, its starting point, random weights and the
    teacher. If folders name classes, it gives the accuracy of 20 nearest neighbours and of linear probes with 1 %, 10 %
    and all labels, with 95 % confidence intervals, and one sentence that says whether pretraining helped. Without
    classes, it gives RankMe and shows nearest neighbours.

    Args:
        checkpoint: a checkpoint of ``mmmilan.pretrain`` or ``tools/train.py``, with its decoder.
        data: folders of images and tar shards that were not trained on, best one folder with a folder for each class.
            If a folder is divided into splits, ``val`` is taken, or else ``test``.
        out: the page to write, a single self-contained file.
        max_images: maximum number of images; if there are more, evenly spaced ones are taken.
        device: where to run, by default on the GPU if there is one.

    Returns:
        The path of the page.

    Raises:
        InputError: there are too few images, or the checkpoint was not pretrained by MILAN.

    Examples:
        >>> mmmilan.report('runs/photos/milan.pth', 'photos', 'runs/photos/report.html')
    """
    import torch
    from mmengine.registry import DefaultScope

    from mmmilan.api.devices import choose_device, device_name
    from mmmilan.api.models import get_model, read_config
    from mmmilan.datasets.image_folder import as_sources
    from mmmilan.visualization import report_sections as sections
    from mmmilan.visualization.page import PAPER_LINK, Page

    begin = time.monotonic()
    sources = as_sources(data)
    config = read_config(checkpoint)
    if 'masking' not in config.model:
        raise InputError(f'{checkpoint} was not pretrained by MILAN; give the checkpoint of a pretraining.')
    device = choose_device(device)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        images = read_images(config, sources, max_images)
        milan = get_model(checkpoint, pretrained=True, encoder_only=False, device=device)
        encoders = build_encoders(milan, config, device)
        features = extract(images, milan.data_preprocessor, encoders)
    page = Page('What pretraining did', sections.introduction(images), PAPER_LINK)
    sections.add_scores(page, features, images)
    sections.add_training(page, checkpoint, config)
    sections.add_neighbours(page, features, images)
    sections.add_pictures(page, milan, encoders, images)
    page.paragraph(f'mmmilan report {checkpoint} {" ".join(map(os.fspath, sources))} --out {out}', 'code')
    minutes = (time.monotonic() - begin) / 60
    page.write(Path(out), f'Made in {minutes:.1f} minutes on {device_name(device)}, PyTorch {torch.__version__}.')
    return Path(out)


def read_images(config: Config, sources: Sequence[str | os.PathLike], max_images: int) -> Images:
    """At most ``max_images`` images of the sources, with labels if the folders of a single source name classes.

    Raises:
        InputError: there are too few images.
    """
    import numpy as np
    import torch
    from mmengine.registry import DATASETS

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
    chosen = evenly_spaced(len(dataset), max_images)
    samples = [dataset[i] for i in progress(chosen, 'Reading images', hide_below=500)]
    labels = np.array([int(sample['data_samples'].gt_label) for sample in samples]) if classes else None
    if labels is not None and np.bincount(labels, minlength=len(classes)).min() < 4:
        labels = None  # the probes test on three tenths of each class, which would be less than one image
    return Images(names, torch.stack([sample['inputs'] for sample in samples]), labels, classes)


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
    from mmmilan.checkpoints.loading import use_safe_loading
    from mmmilan.registry import MODELS

    use_safe_loading()
    init_cfg = dict(type='Pretrained', checkpoint=start) if start else None
    backbone = MODELS.build({**config.model.backbone, 'init_cfg': init_cfg})
    logging.disable(logging.INFO)  # MMEngine logs a line for every parameter
    backbone.init_weights()
    logging.disable(logging.NOTSET)
    backbone.eval()  # mmpretrain's backbones return None from it
    return backbone.to(device)


def class_token(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """The class token of whole images, as a function; its attribute ``backbone`` is the backbone."""

    def encode(images: Tensor) -> Tensor:
        return backbone(images)[-1]

    encode.backbone = backbone
    return encode


def extract(
    images: Images, normalise: nn.Module, encoders: dict[str, Callable[[Tensor], Tensor]]
) -> dict[str, np.ndarray]:
    """Features [M, D], float32, of all images, by encoder."""
    import numpy as np
    import torch

    features: dict[str, list] = {name: [] for name in encoders}
    for batch in progress(images.pixels.split(BATCH_SIZE), 'Encoding images'):
        with torch.no_grad():
            inputs = normalise(dict(inputs=batch), False)['inputs']
            for name, encode in encoders.items():
                features[name].append(encode(inputs).float().cpu().numpy())
    return {name: np.concatenate(rows) for name, rows in features.items()}
