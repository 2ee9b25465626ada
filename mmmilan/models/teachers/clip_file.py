"""CLIP's image tower from a file alone, its architecture read off the shapes of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmmilan.checkpoints.config import NoConfig, own_config
from mmmilan.checkpoints.io import check_values
from mmmilan.checkpoints.open_clip_layout import NORM_EPS, is_maskclip, to_open_clip
from mmmilan.errors import InputError
from mmmilan.files import first_line
from mmmilan.models.teachers.base import IMAGENET_MEAN, IMAGENET_STD
from mmmilan.models.teachers.weights import load_weights, read_weights


def build_from_file(path: str, head_width: int) -> tuple[nn.Module, tuple[Sequence[float], Sequence[float]]]:
    """A CLIP visual tower from a checkpoint of MaskCLIP or in OpenAI's layout, its architecture read off the shapes.

    Returns:
        The tower, and mean and standard deviation of its images.

    Raises:
        InputError: if the file holds no such tower.
    """
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.transformer import VisionTransformer

    weights = read_weights(path)
    of_maskclip = is_maskclip(weights)
    image_size = None
    try:
        own = own_backbone(path) if of_maskclip else None
        if own:
            head_width, image_size = own
        state_dict = visual_state_dict(to_open_clip(weights) if of_maskclip else weights, path)
        sizes = tower_sizes(state_dict, path, head_width, image_size, of_maskclip)
        with torch.device('meta'):  # without the memory that a forged shape would ask for
            tower = VisionTransformer(**sizes).state_dict()
        wrong = [key for key in tower.keys() | state_dict.keys() if shape(tower, key) != shape(state_dict, key)]
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError, AttributeError) as error:
        raise InputError(
            f'{path} looks like a CLIP image tower but does not fit ({first_line(error)}); name its model.'
        ) from error
    if wrong:
        key = min(wrong)
        raise InputError(
            f'{path} looks like a CLIP image tower but does not fit: {key} is {shape(state_dict, key) or "missing"}, '
            f'where {shape(tower, key) or "none"} belongs; name its model.'
        )
    visual = VisionTransformer(**sizes)
    load_weights(visual, state_dict, path)
    return visual, (IMAGENET_MEAN, IMAGENET_STD) if of_maskclip else (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


def own_backbone(path: str) -> tuple[int, int | Sequence[int]] | None:
    """Width of the attention heads and image size by the config in a checkpoint of MaskCLIP; None where it has none."""
    from mmpretrain.models import VisionTransformer

    with suppress(NoConfig):
        backbone = own_config(path).model.backbone
        arch = VisionTransformer.arch_zoo[backbone.arch] if isinstance(backbone.arch, str) else backbone.arch
        return arch['embed_dims'] // arch['num_heads'], backbone.get('img_size', 224)
    return None


def shape(weights: dict[str, Tensor], key: str) -> list[int] | None:
    """The shape of a weight, None where it is missing."""
    return list(weights[key].shape) if key in weights else None


def tower_sizes(
    state_dict: dict[str, Tensor],
    path: str,
    head_width: int,
    image_size: int | Sequence[int] | None,
    of_maskclip: bool,
) -> dict[str, Any]:
    """The arguments of open_clip's ViT, read off the shapes of its weights; of a file that does not say, a square's."""
    from open_clip.transformer import LayerNorm, QuickGELU

    width, _, _, patch_size = state_dict['conv1.weight'].shape
    if width % head_width:
        raise InputError(f'The tower in {path} is {width} wide, no multiple of head_width={head_width}; correct it.')
    square = math.isqrt(len(state_dict['positional_embedding']) - 1) * patch_size
    layers = {match[1] for key in state_dict if (match := re.match(r'transformer\.resblocks\.(\d+)\.', key))}
    return dict(
        image_size=image_size or square,
        patch_size=patch_size,
        width=width,
        layers=len(layers),
        heads=width // head_width,
        mlp_ratio=state_dict['transformer.resblocks.0.mlp.c_fc.weight'].shape[0] / width,
        output_dim=state_dict['proj'].shape[1],
        no_ln_pre=of_maskclip,
        act_layer=nn.GELU if of_maskclip else QuickGELU,
        norm_layer=partial(LayerNorm, eps=NORM_EPS) if of_maskclip else LayerNorm,
    )


def visual_state_dict(weights: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tower's own part of the weights, whatever prefix it stands under, in float32."""
    prefixes = [key.removesuffix('class_embedding') for key in weights if key.endswith('class_embedding')]
    if len(prefixes) != 1 or f'{prefixes[0]}conv1.weight' not in weights or f'{prefixes[0]}proj' not in weights:
        raise InputError(
            f"{path} is not in OpenAI's CLIP layout (no visual.class_embedding, visual.conv1.weight and "
            f'visual.proj; it begins with {", ".join(list(weights)[:3])}); name its open_clip model as well.'
        )
    prefix = prefixes[0]
    own = ('class_embedding', 'positional_embedding', 'proj', 'conv1.', 'ln_pre.', 'transformer.', 'ln_post.')
    tower = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    tower = {key: value for key, value in tower.items() if key.startswith(own)}
    check_values(tower, path)
    return {key: value.float() for key, value in tower.items()}
