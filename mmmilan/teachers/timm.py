"""Teachers of timm by name (DINO, DINOv2, DINOv3, SigLIP 2, PE, RADIO, EVA-02, ...), and SLIP from its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmmilan.checkpoints.download import download
from mmmilan.checkpoints.io import check_values
from mmmilan.errors import InputError
from mmmilan.files import first_line
from mmmilan.registry import MODELS
from mmmilan.teachers.base import IMAGENET_MEAN, IMAGENET_STD, Teacher, check_input_size, pair
from mmmilan.teachers.weights import (
    AS_FILE,
    HUB,
    LOCAL,
    hub_file,
    local_folder,
    read_weights,
    warn_random_weights,
    weights_in,
)

CONFIG = 'config.json'
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


@MODELS.register_module()
class TimmTeacher(Teacher):
    """A plain ViT of timm by name (DINO, DINOv3, SigLIP 2, ...), or SLIP from its file (paper, table 5, row 9).

    Args:
        model: Name of a ViT of timm, e.g. 'vit_base_patch16_224.dino', or ``hf-hub:REPOSITORY`` or
            ``local-dir:FOLDER`` with ``config.json`` and weights. See :class:`TimmTower` for what it teaches. The tag
            after the dot also says how the images of a file were normalised.
        pretrained: True for timm's own weights, or those of the repository or folder; a file, in SLIP's layout
            (``visual.*`` in timm's names with ``image_projection``) or a plain timm state dict; None for random
            weights (to measure speed).
        input_size: Side, or height and width, of the image that the teacher sees, by default the model's own; the
            positions are interpolated to it.
        importance_layers: Importance is the mean over so many last blocks.
        register_neurons: See :class:`TimmTower`.
        options: Of :class:`Teacher`.

    Raises:
        InputError: timm has no such model or tag, the model is not a plain ViT, patches do not fill the image, or the
            weights are not there or do not fit.
    """

    def __init__(
        self,
        model: str,
        pretrained: bool | str | None = True,
        input_size: int | tuple[int, int] | None = None,
        importance_layers: int = 1,
        register_neurons: Sequence[tuple[int, int]] = (),
        **options: Any,
    ) -> None:
        from mmmilan.teachers.timm_tower import TimmTower  # timm takes seconds to import

        if model.startswith(HUB):
            model = f'{LOCAL}{Path(hub_file(repo := model.removeprefix(HUB), [CONFIG])).parent}'
            pretrained = hub_file(repo, HUB_FILES) if pretrained is True else pretrained
        size = check_model(model, pair(input_size) if input_size else None)
        path = published_file(model) if pretrained is True else pretrained
        if path:
            weights, head = split_projection(read_weights(path))
            vit = build_vit(model, size, weights, path)
        else:
            warn_random_weights(f'TimmTeacher {model}')
            vit, head = build_vit(model, size), nn.Identity()
        tower = TimmTower(vit, head, size, importance_layers, register_neurons)
        if isinstance(head, nn.Linear):  # SLIP; timm's own weights of this model may be of other images
            tower.mean, tower.std = IMAGENET_MEAN, IMAGENET_STD
        super().__init__(tower, **options)

    @property
    def vit(self) -> nn.Module:
        """timm's model."""
        return self.tower.vit


def check_model(model: str, input_size: tuple[int, int] | None) -> tuple[int, int]:
    """Check a model and its input size before anything is downloaded; its own input size where None is given.

    Raises:
        InputError: timm has no such model or tag, it is not a plain ViT, or patches do not fill the image.
    """
    import timm

    from mmmilan.teachers.timm_tower import check_timm_vit, own_input_size, patch_size

    if model.startswith(LOCAL):
        local_folder(model)
    else:
        architecture, _, tag = model.partition('.')
        if not timm.is_model(architecture):
            raise InputError(f'timm has no model {architecture!r}; timm.list_models("vit*") gives its names.')
        if tag and model not in (tags := timm.models.get_arch_pretrained_cfgs(architecture)):
            raise InputError(f'timm has no weights {model!r}; its tags for this model are {sorted(tags)}.')
    try:
        with torch.device('meta'):
            vit = timm.create_model(model, num_classes=0)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise InputError(f'timm cannot build {model} ({first_line(error)}); correct model=.') from error
    check_timm_vit(vit, model)
    input_size = input_size or own_input_size(vit)
    check_input_size(input_size, patch_size(vit))
    return input_size


def published_file(model: str) -> str:
    """The file of timm's own weights, downloaded if it is not here, or that of a folder."""
    import timm

    if model.startswith(LOCAL):
        return weights_in(local_folder(model), HUB_FILES)
    config = timm.get_pretrained_cfg(model)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(f'timm has no weights of {model}; give them as {AS_FILE}.')
    if not config.hf_hub_id:
        return str(download(config.url))
    names = [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES
    return hub_file(config.hf_hub_id, names)


def split_projection(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], nn.Module]:
    """Weights of a file -> those of the ViT, and SLIP's projection to the joint space where the file has one."""
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    if 'image_projection' not in weights:
        return weights, nn.Identity()
    head = nn.Linear(*weights['image_projection'].shape, bias=False)
    head.load_state_dict(dict(weight=weights['image_projection'].T))
    return {key[7:]: value for key, value in weights.items() if key.startswith('visual.')}, head


def statistics_beside(path: str) -> dict[str, Any]:
    """How the images of a file were normalised, by timm's ``config.json`` beside it; empty where there is none."""
    try:
        settings = json.loads(Path(path).absolute().with_name(CONFIG).read_text(encoding='utf-8'))['pretrained_cfg']
        return {key: tuple(map(float, settings[key])) for key in ('mean', 'std')}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or another program's
        return {}


def build_vit(
    model: str, size: tuple[int, int], weights: dict[str, Tensor] | None = None, path: str | None = None
) -> nn.Module:
    """The model at an input size, with weights that timm itself converts from other layouts and grids.

    Raises:
        InputError: the weights do not fit.
    """
    import timm

    if weights is None:
        return timm.create_model(model, num_classes=0, img_size=size)
    weights = {key: value for key, value in weights.items() if not key.startswith(('head.', 'head_dist.'))}
    check_values(weights, path)
    # no classifier in either of them, or timm would load what fits and leave the rest without a word
    overlay = dict(state_dict=weights, num_classes=0, label_offset=0, source='') | statistics_beside(path)
    try:
        vit = timm.create_model(model, pretrained=True, num_classes=0, img_size=size, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        reason = ' '.join(str(error).split())[:400]
        raise InputError(f'{path} does not fit {model} ({reason}); correct model= or pretrained=.') from error
    vit.pretrained_cfg.pop('state_dict')
    return vit
