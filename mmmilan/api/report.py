"""Is it worth it? A page that compares an encoder with where it came from."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from collections.abc import Callable

    import numpy as np
    from mmengine.config import Config
    from mmengine.model import BaseModel
    from torch import Tensor, nn

    from mmmilan.visualization.report import Images

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

    It compares the class token of the pretrained encoder, of where it started, of random weights and of the teacher.
    Where folders name classes: the 20 nearest neighbours and linear probes with 1 %, 10 % and all labels, with
    intervals of 95 %, and one sentence that says whether it helped. Where they do not: RankMe, and neighbours to see.

    Args:
        checkpoint: what ``mmmilan.pretrain`` wrote (or ``tools/train.py``), with its decoder.
        data: folders of images and tar shards, best one folder with a folder a class, of images that were not trained
            on. Of a folder that is divided into ``train`` and ``val`` or ``test``, ``val`` is taken, or else ``test``.
        out: the page to write, one file with everything in it.
        max_images: at most so many of the images, evenly spaced.
        device: where to run, by default on the GPU if there is one.

    Returns:
        The path of the page.

    Raises:
        InputError: there are too few images, or the checkpoint is not one of pretraining.

    Examples:
        >>> mmmilan.report('runs/photos/milan.pth', 'photos', 'runs/photos/report.html')
    """
    import torch
    from mmengine.registry import DefaultScope

    from mmmilan.api.models import get_model, read_config
    from mmmilan.visualization import report as sections
    from mmmilan.visualization.page import Page

    begin = time.monotonic()
    sources = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    config = read_config(checkpoint)
    if 'masking' not in config.model:
        raise InputError(f'{checkpoint} was not pretrained by MILAN; give the checkpoint of a pretraining.')
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        images = read_images(config, sources, max_images)
        milan = get_model(checkpoint, pretrained=True, encoder_only=False, device=device)
        encoders = build_encoders(milan, config, device)
        features = extract(images, milan.data_preprocessor, encoders)
    page = Page('What pretraining did', sections.introduction(images), sections.LINKS)
    sections.add_scores(page, features, images)
    sections.add_training(page, checkpoint, config)
    sections.add_neighbours(page, features, images)
    sections.add_pictures(page, milan, encoders, images)
    page.paragraph(f'mmmilan report {checkpoint} {" ".join(map(os.fspath, sources))} --out {out}', 'code')
    minutes = (time.monotonic() - begin) / 60
    page.write(Path(out), f'Made in {minutes:.1f} minutes on {device_name(device)}, PyTorch {torch.__version__}.')
    return Path(out)


def read_images(config: Config, sources: Sequence[str | os.PathLike], max_images: int) -> Images:
    """Some of the images, with their classes where the folders of a single source name them."""
    import numpy as np
    import torch
    from mmengine.registry import DATASETS
    from rich.console import Console
    from rich.progress import track

    from mmmilan.datasets.sources import class_folders, evaluation_images
    from mmmilan.visualization.report import QUERIES, Images

    sources = [os.fspath(evaluation_images(source)) for source in sources]
    names, classes = ', '.join(sources), class_folders(sources[0]) if len(sources) == 1 else []
    dataset = dict(type='mmmilan.ImageSources', sources=sources)
    if classes:
        dataset = dict(type='mmmilan.ImageFolder', data_root=sources[0], with_label=True)
    dataset = DATASETS.build(dataset | dict(pipeline=config.test_dataloader.dataset.pipeline))
    if len(dataset) < 2 * QUERIES:
        raise InputError(f'{names} holds {len(dataset)} images; give at least {2 * QUERIES}.')
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), max_images)).astype(int))
    samples = [
        dataset[int(i)]
        for i in track(chosen, 'Reading images', console=Console(stderr=True), disable=len(chosen) < 500)
    ]
    labels = np.array([int(sample['data_samples'].gt_label) for sample in samples]) if classes else None
    if labels is not None and np.bincount(labels, minlength=len(classes)).min() < 4:
        labels = None  # three tenths of a class would be no image
    return Images(names, torch.stack([sample['inputs'] for sample in samples]), labels, classes)


def build_encoders(milan: BaseModel, config: Config, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """What turns normalised images [B, 3, H, W] into class tokens [B, D], by its name on the page."""
    import torch

    from mmmilan.visualization.report import OURS, RANDOM, START, TEACHER

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
    """The encoder as it was before training."""
    from mmmilan.checkpoints.loading import use_safe_loading
    from mmmilan.registry import MODELS

    use_safe_loading()
    init_cfg = dict(type='Pretrained', checkpoint=start) if start else None
    backbone = MODELS.build({**config.model.backbone, 'init_cfg': init_cfg})
    logging.disable(logging.INFO)  # a line for every parameter
    backbone.init_weights()
    logging.disable(logging.NOTSET)
    backbone.eval()  # mmpretrain's backbones return None from it
    return backbone.to(device)


def class_token(backbone: nn.Module) -> Callable[[Tensor], Tensor]:
    """The class token of whole images; the backbone can be had as ``.backbone``."""

    def encode(images: Tensor) -> Tensor:
        return backbone(images)[-1]

    encode.backbone = backbone
    return encode


def extract(
    images: Images, normalise: nn.Module, encoders: dict[str, Callable[[Tensor], Tensor]]
) -> dict[str, np.ndarray]:
    """Features [M, D] of all images, by encoder."""
    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import track

    features: dict[str, list] = {name: [] for name in encoders}
    for batch in track(images.pixels.split(BATCH_SIZE), 'Encoding images', console=Console(stderr=True)):
        with torch.no_grad():
            inputs = normalise(dict(inputs=batch), False)['inputs']
            for name, encode in encoders.items():
                features[name].append(encode(inputs).float().cpu().numpy())
    return {name: np.concatenate(rows) for name, rows in features.items()}


def device_name(device: str) -> str:
    """The name of a GPU, or how many cores a CPU gives."""
    import torch

    return torch.cuda.get_device_name() if device.startswith('cuda') else f'a CPU ({torch.get_num_threads()} threads)'
