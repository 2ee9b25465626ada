"""The models that figures compare: encoders in any layout, and teachers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmmilan.api.models import get_model, is_checkpoint, read_config
from mmmilan.checkpoints.config import NoConfig, own_config
from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
from mmmilan.checkpoints.loading import as_mmmilan
from mmmilan.checkpoints.zoo import resolve_checkpoint, zoo_models
from mmmilan.errors import InputError
from mmmilan.models.attention import record_attention
from mmmilan.teachers import Teacher, build_teacher
from mmmilan.teachers.base import statistics_of
from mmmilan.teachers.by_name import LIBRARIES, names_teacher

# Normalised images [B, 3, H, W] -> features [B, D] and attention of the class token in the last block [B, N].
ComparedModel = Callable[[Tensor], tuple[Tensor, Tensor]]
Statistics = tuple[Sequence[float], Sequence[float]]


def load_compared_model(config: str | os.PathLike, name: str, device: str) -> ComparedModel:
    """Load a model to compare.

    Args:
        config: the config by which images are read, and encoders built that have no config of their own; 'teacher' is
            the teacher of this config.
        name: an encoder: a checkpoint in any layout (file, URL or name of the zoo); ``teacher``; or the name of a
            teacher, as :func:`teacher_config` takes it.
        device: where to put it.

    Raises:
        InputError: there is no such model, or the checkpoint does not fit the config's encoder.
    """
    if name == 'teacher':
        teacher = (read_config(config).model.get('head') or {}).get('teacher')
        if teacher is None:
            raise InputError(f'{config} has no teacher to compare; leave teacher out, or give a config that has one.')
        return compare_teacher(build_teacher(teacher), config, device)
    if names_teacher(name):
        return compare_teacher(build_teacher(name), config, device)
    encoder = load_encoder(config_of(name, config), name, device)
    statistics = [statistics_of(each.model.get('data_preprocessor')) for each in (read_config(config), encoder._config)]
    return ComparedEncoder(encoder.backbone, *statistics)


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


def title_of(name: str) -> str:
    """What a figure calls a model: its name without folders, file extension and library."""
    library, _, rest = name.partition(':')
    name = rest if library in LIBRARIES else name
    if is_checkpoint(name):
        return Path(name).stem
    return Path(name).name if os.path.isdir(name.removeprefix('local-dir:')) else name


def titles_of(names: Sequence[str]) -> list[str]:
    """:func:`title_of` each model; files of one name are told apart by their folders, as in ``first/milan``.

    Raises:
        InputError: a model is named twice.
    """
    short = [title_of(name) for name in names]
    titles = list(short)
    paths = [Path(os.path.abspath(name)).with_suffix('').parts for name in names]
    for i, title in enumerate(short):
        others = [path for path, other in zip(paths, short, strict=True) if other == title and path is not paths[i]]
        if not others:
            continue
        depths = range(1, len(paths[i]))
        depth = next((d for d in depths if all(other[-d:] != paths[i][-d:] for other in others)), None)
        if depth is None or not is_checkpoint(names[i]):
            raise InputError(f'{names[i]} is named twice among the models to compare; name each once.')
        titles[i] = '/'.join(paths[i][-depth:])
    return titles


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
        self.backbone = backbone
        self.given, self.own = given, own
        self.mean = backbone.out_type == 'avg_featmap'
        backbone.out_type = 'raw'

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.given != self.own:
            (mean, std), (own_mean, own_std) = (map(images.new_tensor, each) for each in (self.given, self.own))
            images = images * (std / own_std).view(3, 1, 1) + ((mean - own_mean) / own_std).view(3, 1, 1)
        with record_attention(self.backbone) as attention:
            tokens = self.backbone(images)[-1]
        features = self.backbone.ln2(tokens[:, 1:].mean(1)) if self.mean else tokens[:, 0]
        return features, attention[0]
