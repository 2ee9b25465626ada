"""Check that the parts of a model fit each other, when it is built and not at the first iteration."""

from __future__ import annotations

import math

from torch import nn

from mmmilan.errors import InputError
from mmmilan.models.masking import Masking, SemanticAwareMasking


def check_parts(backbone: nn.Module, masking: Masking, neck: nn.Module, head: nn.Module, target_dim: int) -> None:
    """Check encoder, masking, decoder and head against each other.

    Args:
        backbone: The encoder, a :class:`MILANViT`.
        masking: The masking strategy.
        neck: The decoder.
        head: The target.
        target_dim: Width C of the target.

    Raises:
        InputError: naming the first option that does not fit, and its right value.
    """
    grid, patch_size = tuple(backbone.patch_resolution), backbone.patch_size
    several = len(backbone.out_indices) > 1  # whose outputs are taken before the norms
    rows = [
        ('backbone.final_norm', backbone.final_norm or several, True),
        ('backbone.pre_norm', not isinstance(backbone.pre_norm, nn.Identity), False),  # not of visible patches alone
        ('neck.embed_dim', neck.embed_dim, backbone.embed_dims),
        ('the number of backbone.out_indices', len(backbone.out_indices), getattr(neck, 'num_layers', 1)),
        ('neck.num_patches', as_num_patches(getattr(neck, 'grid', grid)), as_num_patches(grid)),
        ('neck.predict_feature_dim', neck.predict_feature_dim, target_dim),
        ('head.feature_dim', head.feature_dim, target_dim),
        ('head.patch_size', getattr(head, 'patch_size', patch_size), patch_size),
    ]
    channels = backbone.patch_embed.projection.in_channels
    if channels != 3:
        raise InputError(
            f'backbone.in_channels is {channels}, but images have 3 channels for teacher and target, grey ones three '
            'equal ones; leave in_channels out.'
        )
    for name, value, expected in rows:
        if value != expected:
            raise InputError(f'{name} is {value}, but the other parts of the model need {expected}; set it to that.')
    if head.teacher is not None:
        check_grid(head.teacher, backbone, 'head.teacher')
    elif isinstance(masking, SemanticAwareMasking):
        raise InputError('SemanticAwareMasking needs a frozen teacher; give the head one, or use RandomMasking.')


def as_num_patches(grid: tuple[int, int]) -> int | tuple[int, int]:
    """A grid as configs give it: the number of patches of a square, else (rows, columns)."""
    return math.prod(grid) if grid[0] == grid[1] else grid


def check_grid(teacher: nn.Module, backbone: nn.Module, name: str) -> None:
    """Check that a teacher's grid of patches is the encoder's.

    Args:
        teacher: The teacher.
        backbone: The encoder, a :class:`MILANViT`.
        name: What the config calls the teacher.

    Raises:
        InputError: naming the teacher's right input size.
    """
    grid = tuple(backbone.patch_resolution)
    if teacher.grid != grid:
        rows, columns = (side * teacher.patch_size for side in grid)
        raise InputError(
            f'{name} sees {as_num_patches(teacher.grid)} patches and the encoder {as_num_patches(grid)}; set '
            f'{name}.input_size to {rows if rows == columns else (rows, columns)}.'
        )
