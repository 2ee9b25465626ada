"""Teachers of open_clip: by name, from a folder or a repository, or from a file alone (``clip_source.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from mmmilan.checkpoints.io import check_values
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mmmilan.teachers.base import Teacher, Tower, check_input_size, pair
from mmmilan.teachers.clip_source import CLIPSource, find_source, new_visual
from mmmilan.teachers.clip_towers import CLIPTower, check_clip_tower, load_text_tower, resize_positions
from mmmilan.teachers.timm import TimmTower, check_timm_vit, own_input_size, patch_size
from mmmilan.teachers.weights import load_weights, warn_random_weights


@MODELS.register_module()
class OpenCLIPTeacher(Teacher):
    """The image tower of a CLIP: its last norm and the projection to the joint space, for every token.

    The text tower is not built. See :class:`CLIPTower` for open_clip's own ViTs and :class:`TimmTower` for those of
    timm in it (SigLIP, PE, EVA-02, MobileCLIP).

    Args:
        model: Name of an open_clip model with a ViT tower, or ``hf-hub:REPOSITORY`` or ``local-dir:FOLDER`` with
            ``open_clip_config.json`` and weights. None: what ``pretrained`` is, its file says, which is a checkpoint of
            :class:`MaskCLIP`, one of OpenAI (TorchScript archive, or its state dict with the numbers that mark it;
            QuickGELU), or one with ``open_clip_config.json`` beside it. Of no other file is the activation known.
        pretrained: An open_clip tag, a file, or None for random weights (to measure speed); for a repository or a
            folder None gives its own weights.
        input_size: Side, or height and width, of the image that the teacher sees, by default its own. The positions are
            interpolated to it. 196 gives ViT-L/14 the 14 x 14 grid of a student with patches of 16 at 224.
        head_width: Width of the attention heads of a tower without model name, which weight shapes do not reveal; the
            config in a checkpoint of MaskCLIP does.
        importance_layers: Importance is the mean over so many last blocks.
        register_neurons: See :class:`CLIPTower`.
        options: Of :class:`Teacher`.

    Raises:
        InputError: open_clip has no such model or tag, its tower is not a ViT, patches do not fill the image, the
            weights are not there or do not fit, or nothing says which activation they were trained with.
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
        source = find_source(model, pretrained, head_width)
        tower = build_tower(build_visual(source, size), size, importance_layers, register_neurons)
        tower.mean, tower.std = source.statistics
        tower.load_text = partial(load_text_tower, model, pretrained, head_width)
        super().__init__(tower, **options)

    @property
    def visual(self) -> nn.Module:
        """open_clip's tower, where it is open_clip's own."""
        return self.tower.visual


def build_tower(visual: nn.Module, size: tuple[int, int] | None, *options: Any) -> Tower:
    """What runs open_clip's own towers, or those of timm in it."""
    if isinstance(visual, TimmModel):
        return TimmTower(visual.trunk, visual.head, size or own_input_size(visual.trunk), *options)
    return CLIPTower(visual, size, *options)


def build_visual(source: CLIPSource, size: tuple[int, int] | None) -> nn.Module:
    """The visual tower of a CLIP with its weights; a tower of timm is set to the input size.

    Raises:
        InputError: the tower is not a ViT, or the weights do not fit.
    """
    with torch.device('meta'):  # before anything is downloaded
        check_visual(new_visual(source.config), source.name, size)
    if source.read is None:
        warn_random_weights(f'OpenCLIPTeacher {source.name}')
    weights, path = source.read() if source.read else (None, None)
    visual = new_visual(source.config)
    if weights is not None:
        load_visual(visual, weights, path)
    if size and hasattr(visual, 'set_input_size'):
        visual.set_input_size(size)
    return visual


def check_visual(visual: nn.Module, model: str, size: tuple[int, int] | None) -> None:
    """Raise an :class:`InputError` for a tower that cannot teach, or an image that its patches do not fill."""
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
