"""What figures compare: encoders of any layout, and teachers; class token and its attention of each image."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmmilan.api.models import get_model, is_checkpoint, read_config
from mmmilan.errors import InputError
from mmmilan.models.attention import class_attention
from mmmilan.models.teachers import Teacher
from mmmilan.registry import MODELS

# Normalised images [B, 3, H, W] -> features [B, D] and attention of the class token in the last block [B, N].
Source = Callable[[Tensor], tuple[Tensor, Tensor]]


def load_source(config: str | os.PathLike, name: str, device: str) -> Source:
    """A model to compare.

    Args:
        config: the config that says how encoders are built; its teacher is meant by 'teacher'.
        name: a checkpoint in any layout (file, URL or name of the zoo), ``teacher``, ``timm:MODEL`` or
            ``open_clip:MODEL:TAG``.
        device: where to put it.

    Raises:
        InputError: there is no such model, or the checkpoint does not fit the config's encoder.
    """
    kind, _, rest = name.partition(':')
    if kind == 'timm':
        return as_source(MODELS.build(dict(type='mmmilan.TimmTeacher', model=rest)), device)
    if kind == 'open_clip':
        model, _, tag = rest.partition(':')
        return as_source(MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', model=model, pretrained=tag)), device)
    if name == 'teacher':
        teacher = read_config(config).model.get('head', {}).get('teacher')
        if teacher is None:
            raise InputError(f'{config} has no teacher to compare; leave teacher out, or give a config that has one.')
        return as_source(MODELS.build(teacher), device)
    return EncoderSource(get_model(config, name, device=device).backbone)


def title_of(name: str) -> str:
    """What a figure calls a model: the name without folders and ending."""
    if is_checkpoint(name):
        return Path(name).stem
    return name.partition(':')[2] or name


def as_source(teacher: Teacher, device: str) -> Source:
    """A teacher, whose importance is the attention that is asked for."""
    teacher = teacher.to(device).eval()

    def source(images: Tensor) -> tuple[Tensor, Tensor]:
        features, importance = teacher(images)
        return features[:, 0], importance

    return source


class EncoderSource:
    """A ViT of mmpretrain's kind, such as :class:`MILANViT`.

    Features are what stands before a linear head: the class token, or the mean of the patch tokens where the encoder
    was trained with it.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.mean = backbone.out_type == 'avg_featmap'
        backbone.out_type = 'raw'
        self.inputs: list[Tensor] = []
        backbone.layers[-1].ln1.register_forward_hook(lambda module, args, output: self.inputs.append(output))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.backbone(images)[-1]
        features = self.backbone.ln2(tokens[:, 1:].mean(1)) if self.mean else tokens[:, 0]
        attn = self.backbone.layers[-1].attn
        return features, class_attention(self.inputs.pop(), attn.qkv.weight, attn.qkv.bias, attn.num_heads)
