"""The paper's figures for a user's own checkpoints and images, and the models that they compare."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmmilan import arguments
from mmmilan.api.inference import Inferencer
from mmmilan.api.models import get_model, is_checkpoint, read_config, titles_of
from mmmilan.api.recipe import replace_teacher
from mmmilan.arguments import checked
from mmmilan.checkpoints.config import NoConfig, own_config
from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
from mmmilan.checkpoints.loading import as_mmmilan
from mmmilan.checkpoints.zoo import resolve_checkpoint, zoo_models
from mmmilan.datasets.image_folder import as_sources
from mmmilan.datasets.splits import list_labelled_images
from mmmilan.errors import InputError, warn
from mmmilan.evaluation.features import check_tokens, choose_device, join
from mmmilan.files import check_output_folder
from mmmilan.models.vit import record_attention
from mmmilan.teachers import Teacher, build_teacher
from mmmilan.teachers.base import Renormalise, statistics_of
from mmmilan.teachers.by_name import names_teacher
from mmmilan.visualization.page import Page
from mmmilan.visualization.pictures import draw_heat, draw_masked, draw_pictures, draw_tsne, save_figure, to_images

NUM_SMALL, NUM_LARGE = 4, 12  # images in figures 3 and 5, and in figure 4
FILES = ('index.html', *(f'figure{number}.{kind}' for number in (2, 3, 4, 5) for kind in ('png', 'pdf')))


@checked
def figures(
    images: arguments.Path,
    checkpoints: arguments.Paths,
    out: arguments.Path,
    *,
    config: arguments.Path | None = None,
    teacher: arguments.Path | None = None,
    num_classes: arguments.Count = 20,
    images_per_class: arguments.Count = 50,
    seed: arguments.Seed = 0,
    device: arguments.Device | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw figures 2 to 5 of the paper: t-SNE, attention of several models side by side, mask and loss per patch.

    Each figure is written as PNG and PDF, and ``index.html`` shows and explains them. The same inputs and the same seed
    give the same files. Figure 2 needs images in two or more folders, which name the classes; figure 5 needs a
    checkpoint with its decoder.

    Args:
        images: folder of images. If it is divided into splits, ``val`` is taken, or else ``test``.
        checkpoints: models to compare: a checkpoint in any layout (of this project, MAE, mmpretrain, timm: file, URL or
            name of the zoo), ``teacher`` for the config's own, or the name of a teacher, such as
            ``vit_base_patch16_224.dino`` or ``ViT-B-16-quickgelu:openai``.
        out: folder to write.
        config: a config or a model of the zoo, by which the images are read, and those encoders are built that have no
            config in the checkpoint or beside it; by default that of the first checkpoint that has one.
        teacher: the teacher in place of that of the configs, if it has moved: a name or a file, as for
            ``mmmilan.pretrain``.
        num_classes: maximum number of classes in figure 2; if there are more, they are sampled.
        images_per_class: maximum number of images per class in figure 2.
        seed: seed of the sample of images, of t-SNE, and of the masks in figure 5.
        device: where to run, by default on the GPU if there is one.
        overwrite: replace the figures and the page in ``out``.

    Returns:
        The path of the page.

    Raises:
        InputError: there is no image or no checkpoint, a checkpoint does not fit the config, or ``out`` must not or
            cannot be written.
    """
    checkpoints = [os.fspath(each) for each in as_sources(checkpoints)]
    images = os.fspath(images)
    config = os.fspath(config or next((each for each in checkpoints if config_of(each, '')), checkpoints[0]))
    inputs = [config, *checkpoints, images]
    folder = check_output_folder(out, FILES, inputs, overwrite=overwrite, pictures=True)
    device = choose_device(device)
    reader = Inferencer(get_model(config), device=device)
    files, labels, classes = list_labelled_images(images)
    named = dict(zip(titles_of(checkpoints), checkpoints, strict=True))
    models = {title: load_compared_model(config, name, device, teacher) for title, name in named.items()}
    random = np.random.default_rng(seed)
    page = Page('Figures', f'{", ".join(models)} on images of {images}, seed {seed}.')

    if len(classes) > 1:
        chosen = sample_classes(labels, num_classes, images_per_class, random)
        add_tsne(page, folder, reader, models, [files[i] for i in chosen], labels[chosen], classes, seed)
    else:
        leave_out(page, f'Figure 2 is left out: {images} has no folders that name two or more classes.')
    order = random.permutation(len(files))
    readable = reader.extract(files, lambda inputs: {}, indices=order, batch_size=1, num_workers=0)
    pictures = [files[order[batch['position'][0]]] for batch in itertools.islice(readable, NUM_SMALL + NUM_LARGE)]
    for number, part in (3, pictures[:NUM_SMALL]), (4, pictures[NUM_SMALL:]):
        if part:
            add_attention(page, folder, number, reader, models, part)
    add_reconstruction(page, folder, reader, config, named, pictures[:NUM_SMALL], seed, device, teacher)
    path = folder / 'index.html'
    page.write(path, f'Written by mmmilan figures with seed {seed}, PyTorch {torch.__version__}.')
    return path


def sample_classes(labels: np.ndarray, num_classes: int, per_class: int, random: np.random.Generator) -> np.ndarray:
    """Sample at most ``num_classes`` classes and ``per_class`` images of each; returns sorted indices of the images."""
    chosen = random.permutation(np.unique(labels))[:num_classes]
    return np.sort(np.concatenate([random.permutation(np.flatnonzero(labels == c))[:per_class] for c in chosen]))


def leave_out(page: Page, text: str) -> None:
    """Say on the page and in the log what is left out, and why."""
    page.heading('Left out', text)
    warn(text)


def add_tsne(
    page: Page,
    folder: Path,
    reader: Inferencer,
    models: dict[str, ComparedModel],
    files: list[str],
    labels: np.ndarray,
    classes: Sequence[str],
    seed: int,
) -> None:
    """Figure 2: t-SNE of the features."""

    def encode(images: Tensor) -> dict[str, Tensor]:
        return {name: model(images)[0] for name, model in models.items()}

    found = join(reader.extract(files, encode, 'Features for figure 2', batch_size=32))
    used = found['position']
    present, labels = np.unique(labels[used], return_inverse=True)
    if len(present) < 2:
        leave_out(page, 'Figure 2 is left out: the images that decode are not of two or more classes.')
        return
    features = {name: found[name] for name in models}
    figure = draw_tsne(features, labels, [classes[i] for i in present], seed)
    page.heading(
        'Figure 2: which classes the encoders separate',
        f'Features of {len(used)} images of {len(present)} classes in two dimensions (t-SNE), one colour per class. '
        'The silhouette is computed from the features themselves: 1 if each class is a cluster, 0 if classes overlap.',
    )
    page.figure(save_figure(figure, folder / 'figure2'), f't-SNE of the features of {", ".join(models)}')


def add_attention(
    page: Page, folder: Path, number: int, reader: Inferencer, models: dict[str, ComparedModel], files: list[str]
) -> None:
    """Figure 3 or 4: attention maps."""
    batch = reader.inputs(files)
    originals = to_images(batch, reader.model.data_preprocessor)
    columns = {'image': originals}
    for name, model in models.items():
        columns[name] = [draw_heat(*pair, 'inferno') for pair in zip(originals, model(batch)[1], strict=True)]
    page.heading(
        f'Figure {number}: where the class token looks',
        'Attention of the class token to each patch in the last block, averaged over heads; bright is high. Each map '
        'is scaled from its minimum to its maximum.',
    )
    page.figure(
        save_figure(draw_pictures(columns, 'inferno', 'attention'), folder / f'figure{number}'),
        f'Attention of {", ".join(models)}',
    )


def add_reconstruction(
    page: Page,
    folder: Path,
    reader: Inferencer,
    config: str,
    named: dict[str, str],
    files: list[str],
    seed: int,
    device: str,
    teacher: str | os.PathLike | None,
) -> None:
    """Figure 5: mask and loss per patch, of the first checkpoint (by its title) that has its decoder."""
    reasons = []
    for title, name in named.items():
        try:
            source = config_of(name, config)
            other = teacher if own_teacher(source) else None
            model = get_model(source, name, device=device, encoder_only=False, teacher=other)
        except InputError as error:
            reasons.append(str(error))
            continue
        if not hasattr(model, 'reconstruct'):
            reasons.append(f'{source} is a {type(model).__name__}, which has no loss of patches.')
            continue
        if source != config:
            reader = Inferencer(get_model(source), device=device)
        batch = reader.inputs(files)
        originals = to_images(batch, reader.model.data_preprocessor)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            predicted = list(zip(originals, model.predict(batch), strict=True))
        columns = {
            'image': originals,
            'visible': [draw_masked(image, sample.mask) for image, sample in predicted],
            'loss': [draw_heat(image, sample.patch_loss, 'Greens') for image, sample in predicted],
        }
        page.heading(
            f'Figure 5: what {title} sees and misses',
            'The image; the patches that the encoder sees; and the loss of each patch: dark green is high.',
        )
        page.figure(
            save_figure(draw_pictures(columns, 'Greens', 'loss'), folder / 'figure5'), f'Mask and loss of {title}'
        )
        return
    leave_out(page, f'Figure 5 is left out: no checkpoint has its decoder ({reasons[0]})')


# Normalised images [B, 3, H, W] -> features [B, D] and attention of the class token in the last block [B, N].
ComparedModel = Callable[[Tensor], tuple[Tensor, Tensor]]
Statistics = tuple[Sequence[float], Sequence[float]]


def load_compared_model(
    config: str | os.PathLike, name: str, device: str, teacher: str | os.PathLike | None = None
) -> ComparedModel:
    """Load a model to compare.

    Args:
        config: the config by which images are read, and encoders built that have no config of their own; 'teacher' is
            the teacher of this config.
        name: an encoder: a checkpoint in any layout (file, URL or name of the zoo); ``teacher``; or the name of a
            teacher, as :func:`teacher_config` takes it.
        device: where to put it.
        teacher: the teacher in place of the config's.

    Raises:
        InputError: there is no such model, or the checkpoint does not fit the config's encoder.
    """
    if name == 'teacher':
        if own_teacher(config) is None:
            raise InputError(f'{config} has no teacher to compare; leave teacher out, or give a config that has one.')
        whole = read_config(config)
        if teacher is not None:
            replace_teacher(whole, teacher, config)
        return compare_teacher(build_teacher(whole.model.head.teacher), config, device)
    if names_teacher(name):
        return compare_teacher(build_teacher(name), config, device)
    encoder = load_encoder(config_of(name, config), name, device)
    statistics = [statistics_of(each.model.get('data_preprocessor')) for each in (read_config(config), encoder._config)]
    return ComparedEncoder(encoder.backbone, *statistics)


def own_teacher(config: str | os.PathLike) -> Any:
    """The teacher that a config names; None if it has none."""
    return (read_config(config).model.get('head') or {}).get('teacher')


def config_of(name: str, config: str | os.PathLike) -> str | os.PathLike:
    """Where to read how a checkpoint is built: itself or its name, if it has a config, else the given config."""
    if name in zoo_models():
        return name
    if is_checkpoint(name) and Path(name).is_file():
        with suppress(NoConfig):
            own_config(name)
            return name
    return config


def load_encoder(config: str | os.PathLike, checkpoint: str, device: str) -> BaseModel:
    """The encoder of a checkpoint, without a head and with the norm that its weights have.

    A norm after the mean of the patch tokens is that of a fine-tuned encoder, and a norm of all tokens that of a
    pretrained one, whatever the config describes.

    Raises:
        InputError: there is no such checkpoint, or its encoder is not the config's.
    """
    path = resolve_checkpoint(checkpoint)
    weights = {key.removeprefix('backbone.') for key in as_mmmilan(get_state_dict(load_checkpoint_file(path)))}
    pooled, normed = 'ln2.weight' in weights, 'ln1.weight' in weights
    changes = {}
    if pooled != normed:
        changes = dict(backbone=dict(out_type='avg_featmap' if pooled else 'cls_token', final_norm=normed))
    return get_model(config, path, device=device, neck=None, head=None, **changes)


def compare_teacher(teacher: Teacher, config: str | os.PathLike, device: str) -> ComparedModel:
    """A teacher as a model to compare, on images that are normalised as the config says."""
    teacher.take_images(*statistics_of(read_config(config).model.get('data_preprocessor')))
    teacher = teacher.to(device).eval()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        features, importance = teacher(images)
        return features[:, 0], importance

    return run


class ComparedEncoder:
    """A ViT of mmpretrain's kind, such as :class:`MILANViT`, as a model to compare.

    The features are the input of a linear head: the class token, or the mean of the patch tokens if the encoder was
    trained with it.

    Args:
        backbone: The encoder.
        given: Mean and standard deviation by which images come normalised, in [0, 1].
        own: Those of the encoder.
    """

    def __init__(self, backbone: nn.Module, given: Statistics, own: Statistics) -> None:
        check_tokens(backbone)
        self.backbone = backbone
        self.mean = backbone.out_type == 'avg_featmap'
        backbone.out_type = 'raw'
        self.renormalise = nn.Identity() if given == own else Renormalise(*given, *own)
        self.renormalise.to(next(backbone.parameters()).device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with record_attention(self.backbone) as attention:
            tokens = self.backbone(self.renormalise(images))[-1]
        features = self.backbone.ln2(tokens[:, 1:].mean(1)) if self.mean else tokens[:, 0]
        return features, attention[0]
