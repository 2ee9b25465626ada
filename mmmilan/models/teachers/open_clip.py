"""Teachers of open_clip: by name, or from a file alone (``clip_file.py``)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmmilan.checkpoints.io import check_values
from mmmilan.errors import InputError
from mmmilan.models.teachers.base import Teacher, Tower, check_input_size, pair
from mmmilan.models.teachers.clip_file import build_from_file
from mmmilan.models.teachers.clip_text import load_text_tower
from mmmilan.models.teachers.open_clip_zoo import find_config, mean_std, published_file
from mmmilan.models.teachers.weights import load_weights, read_weights, warn_random_weights
from mmmilan.models.text_tower import TextTower
from mmmilan.registry import MODELS


@MODELS.register_module()
class OpenCLIPTeacher(Teacher):
    """The image tower of a CLIP: its last norm and the projection to the joint space, for every token.

    The text tower is not built. See :class:`CLIPTower` for open_clip's own ViTs and :class:`TimmTower` for those of
    timm in it (SigLIP, PE, EVA-02, MobileCLIP).

    Args:
        model: Name of an open_clip model with a ViT tower. None reads the architecture off the shapes of the
            ``pretrained`` file: a checkpoint of :class:`MaskCLIP`, or one in OpenAI's layout (TorchScript archive or
            state dict, the whole CLIP or its visual tower alone, QuickGELU).
        pretrained: An open_clip tag, a file, or None for random weights (to measure speed).
        input_size: Side, or height and width, of the image that the teacher sees, by default its own. The positions are
            interpolated to it. 196 gives ViT-L/14 the 14 x 14 grid of a student with patches of 16 at 224.
        head_width: Width of the attention heads of a tower without model name, which weight shapes do not reveal; the
            config in a checkpoint of MaskCLIP does.
        importance_layers: Importance is the mean over so many last blocks.
        register_neurons: See :class:`CLIPTower`.
        options: Of :class:`Teacher`.

    Raises:
        InputError: open_clip has no such model or tag, its tower is not a ViT, patches do not fill the image, or the
            weights are not there or do not fit.
    """

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        input_size: int | tuple[int, int] | None = None,
        head_width: int = 64,
        importance_layers: int = 1,
        register_neurons: Sequence[tuple[int, int]] = (),
        **options: Any,
    ) -> None:
        if model is None and pretrained is None:
            raise InputError('OpenCLIPTeacher has neither a model nor weights; give model=NAME, or pretrained=FILE.')
        size = pair(input_size) if input_size else None
        if model is None:
            visual, normalisation = build_from_file(pretrained, head_width)
        else:
            visual, normalisation = build_visual(model, pretrained, size), mean_std(model, pretrained)
        tower = build_tower(visual, size, importance_layers, register_neurons)
        tower.mean, tower.std = normalisation
        super().__init__(tower, **options)
        self.source = dict(model=model, pretrained=pretrained, head_width=head_width)

    def text_tower(self) -> TextTower:
        """The text tower of the same CLIP, built anew."""
        return load_text_tower(**self.source)

    @property
    def visual(self) -> nn.Module:
        """open_clip's tower, where it is open_clip's own."""
        return self.tower.visual


def build_tower(visual: nn.Module, size: tuple[int, int] | None, *options: Any) -> Tower:
    """What runs open_clip's own towers, or those of timm in it."""
    from open_clip.timm_model import TimmModel

    from mmmilan.models.teachers.clip_tower import CLIPTower
    from mmmilan.models.teachers.timm_tower import TimmTower, own_input_size

    if isinstance(visual, TimmModel):
        return TimmTower(visual.trunk, visual.head, size or own_input_size(visual.trunk), *options)
    return CLIPTower(visual, size, *options)


def build_visual(model: str, pretrained: str | None, size: tuple[int, int] | None) -> nn.Module:
    """The visual tower of an open_clip model with its weights; a tower of timm is set to the input size.

    Raises:
        InputError: open_clip has no such model or tag, the tower is not a ViT, or the weights do not fit.
    """
    config = find_config(model, pretrained)
    with torch.device('meta'):  # before anything is downloaded
        check_visual(new_visual(config), model, size)
    if pretrained is None:
        warn_random_weights(f'OpenCLIPTeacher {model}')
    path = pretrained if pretrained is None or os.path.exists(pretrained) else published_file(model, pretrained)
    visual = new_visual(config)
    if path is not None:
        load_visual(visual, read_weights(path), path)
    if size and hasattr(visual, 'set_input_size'):
        visual.set_input_size(size)
    return visual


def new_visual(config: dict[str, Any]) -> nn.Module:
    """The visual tower alone, with random weights."""
    from open_clip.model import _build_vision_tower  # open_clip's public way makes the text tower as well

    vision = config['vision_cfg'] | dict(timm_model_pretrained=False)
    return _build_vision_tower(config['embed_dim'], vision, config.get('quick_gelu', False))


def check_visual(visual: nn.Module, model: str, size: tuple[int, int] | None) -> None:
    """Raise an :class:`InputError` for a tower that cannot teach, or an image that its patches do not fill."""
    from open_clip.timm_model import TimmModel

    from mmmilan.models.teachers.clip_tower import check_clip_tower
    from mmmilan.models.teachers.timm_tower import check_timm_vit, patch_size

    if isinstance(visual, TimmModel):
        check_timm_vit(visual.trunk, f'The image tower of {model}')
    else:
        check_clip_tower(visual, model)
    if size:
        check_input_size(size, patch_size(visual.trunk) if isinstance(visual, TimmModel) else visual.patch_size[0])


def load_visual(visual: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Load the tower's part of a file, whatever prefix it stands under, its positions interpolated to the tower's grid.

    Raises:
        InputError: the file holds no such tower.
    """
    from mmmilan.models.teachers.clip_tower import resize_positions

    own = visual.state_dict()
    first = next(iter(own))
    prefixes = [key.removesuffix(first) for key in weights if key == first or key.endswith(f'.{first}')]
    if not prefixes:
        raise InputError(f'{path} does not fit this teacher: it has no {first!r} under any prefix; name its model.')
    prefix = min(prefixes, key=lambda prefix: ('visual' not in prefix, len(prefix)))
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    weights = {key: value for key, value in weights.items() if prefix or key in own}
    check_values(weights, path, own)
    weights = {key: value.float() for key, value in weights.items()}
    positions = weights.get('positional_embedding')
    if positions is not None and len(positions) != len(own.get('positional_embedding', positions)):
        side = math.isqrt(len(positions) - 1)  # published weights are of squares
        weights['positional_embedding'] = resize_positions(positions, (side, side), visual.grid_size)
    load_weights(visual, weights, path)
