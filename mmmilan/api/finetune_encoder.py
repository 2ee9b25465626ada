"""The encoder that fine-tuning starts from: its shape and the normalisation of its images, read off a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mmmilan.api.recipe import config_of, named_arch, normalisation_of
from mmmilan.building import arch_sizes
from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
from mmmilan.checkpoints.loading import as_mmmilan
from mmmilan.checkpoints.positions import grid_of
from mmmilan.checkpoints.zoo import resolve_checkpoint
from mmmilan.errors import InputError, count
from mmmilan.teachers.base import pair


class Encoder(NamedTuple):
    """The shape of a ViT, as ``start`` or ``arch`` say it, and the normalisation of its images.

    Attributes:
        arch: mmpretrain's, with all sizes.
        patch_size: Side of a patch in pixels.
        img_size: Side, or height and width, of the images that its positions are stored for.
        normalisation: Of the data preprocessor; {} for ImageNet's.
    """

    arch: dict[str, int]
    patch_size: int
    img_size: int | tuple[int, int]
    normalisation: dict[str, Any]


def encoder_of(start: str | None, arch: str | dict[str, Any] | None, patch_size: int | None) -> Encoder:
    """The encoder of a checkpoint, or a new one.

    Args:
        start: A checkpoint, see :func:`mmmilan.checkpoints.zoo.resolve_checkpoint`; None for random weights.
        arch: As for ``mmmilan.pretrain``; by default that of the checkpoint, or 'base'.
        patch_size: By default that of the checkpoint, or 16.

    Raises:
        InputError: the checkpoint is missing or of another kind, or ``arch`` or ``patch_size`` are not its own.
    """
    asked = None if arch is None else arch_sizes(named_arch(arch))
    if start is None:
        return Encoder(asked or arch_sizes('base'), patch_size or 16, 224, {})
    found = encoder_in(start)
    if asked and asked != found.arch:
        raise InputError(
            f'{start} is a ViT of {in_words(found.arch)}, but arch is one of {in_words(asked)}; leave out arch.'
        )
    if patch_size not in (None, found.patch_size):
        raise InputError(
            f'{start} has patches of {found.patch_size} pixels, but patch_size={patch_size}; leave out patch_size.'
        )
    return found


def in_words(arch: Mapping[str, int]) -> str:
    """The sizes of a ViT for a message."""
    blocks, heads = count(arch['num_layers'], 'block'), count(arch['num_heads'], 'head')
    return f'width {arch["embed_dims"]} ({arch["feedforward_channels"]} in its FFNs), {blocks} and {heads}'


def encoder_in(start: str) -> Encoder:
    """The encoder in a checkpoint, read off its weights; what these do not tell, off its config if it has one.

    Raises:
        InputError: there is no such checkpoint, or it holds no plain ViT.
    """
    path = resolve_checkpoint(start)
    content = load_checkpoint_file(path)
    weights = as_mmmilan(get_state_dict(content, start), start)
    weights = {key.removeprefix('module.').removeprefix('backbone.'): value for key, value in weights.items()}
    if 'pre_norm.weight' in weights:
        raise InputError(
            f'{start} is the image tower of a CLIP, whose activation its weights do not tell; fine-tune it with '
            'configs/milan/benchmarks/vit-base-p16_clip-pre_8xb128-coslr-100e_in1k.py.'
        )
    names = 'patch_embed.projection.weight', 'pos_embed', 'layers.0.ffn.layers.0.0.weight'
    if not all(name in weights for name in names):
        raise InputError(f'{start} holds no ViT; give the checkpoint of an encoder.')
    patches, positions, widening = (weights[name] for name in names)
    width, blocks = len(patches), len({key.split('.')[1] for key in weights if key.startswith('layers.')})
    config = config_of(start, path, content)
    backbone = config.get('model', {}).get('backbone', {})
    arch = dict(embed_dims=width, num_layers=blocks, num_heads=max(1, width // 64), feedforward_channels=len(widening))
    own = backbone.get('arch')
    if own is not None and (own := arch_sizes(own))['embed_dims'] == width:
        arch['num_heads'] = own['num_heads']
    side = stored_size(positions, patches.shape[-1], backbone.get('img_size'))
    return Encoder(arch, patches.shape[-1], side, normalisation_of(config, start))


def stored_size(positions: Tensor, patch_size: int, said: Any) -> int | tuple[int, int]:
    """The size of images that positions [1, N or 1 + N, D] are stored for; ``said`` is that of the config."""
    if said is not None:
        sides = tuple(side // patch_size for side in pair(said))
        if positions.shape[1] - math.prod(sides) in (0, 1):
            return said if isinstance(said, int) else tuple(said)
    if grid := grid_of(positions):
        return grid[0] * patch_size if grid[0] == grid[1] else (grid[0] * patch_size, grid[1] * patch_size)
    side = math.isqrt(positions.shape[1])  # of N, or of 1 + N
    if positions.shape[1] - side * side not in (0, 1):
        return 224
    return side * patch_size
