"""Teachers of timm by name (DINO, DINOv2, DINOv3, SigLIP 2, PE, RADIO, EVA-02, ...), and SLIP from its file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmmilan.checkpoints.download import download
from mmmilan.checkpoints.io import check_values
from mmmilan.errors import InputError
from mmmilan.models.teachers.base import Teacher, check_input_size, pair
from mmmilan.models.teachers.weights import hub_file, read_weights, warn_random_weights
from mmmilan.registry import MODELS


@MODELS.register_module()
class TimmTeacher(Teacher):
    """A plain ViT of timm by name (DINO, DINOv3, SigLIP 2, ...), or SLIP from its file (paper, table 5, row 9).

    Args:
        model: Name of a ViT of timm, e.g. 'vit_base_patch16_224.dino'. See :class:`TimmTower` for what it teaches.
        pretrained: True for timm's own weights; a file, in SLIP's layout (``visual.*`` in timm's names with
            ``image_projection``) or a plain timm state dict; None for random weights (to measure speed).
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
        from mmmilan.models.teachers.timm_tower import TimmTower  # timm takes seconds to import

        size = check_model(model, pair(input_size) if input_size else None)
        path = published_file(model) if pretrained is True else pretrained
        if path:
            weights, head = split_projection(read_weights(path))
            vit = build_vit(model, size, weights, path)
        else:
            warn_random_weights(f'TimmTeacher {model}')
            vit, head = build_vit(model, size), nn.Identity()
        super().__init__(TimmTower(vit, head, size, importance_layers, register_neurons), **options)

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

    from mmmilan.models.teachers.timm_tower import check_timm_vit, own_input_size, patch_size

    architecture, _, tag = model.partition('.')
    if not timm.is_model(architecture):
        raise InputError(f'timm has no model {architecture!r}; timm.list_models("vit*") gives its names.')
    if tag and model not in (tags := timm.models.get_arch_pretrained_cfgs(architecture)):
        raise InputError(f'timm has no weights {model!r}; its tags for this model are {sorted(tags)}.')
    with torch.device('meta'):
        vit = timm.create_model(model, num_classes=0)
    check_timm_vit(vit, model)
    input_size = input_size or own_input_size(vit)
    check_input_size(input_size, patch_size(vit))
    return input_size


def published_file(model: str) -> str:
    """The file of timm's own weights, downloaded if it is not here."""
    import timm

    config = timm.get_pretrained_cfg(model)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(f'timm has no weights of {model}; give them as pretrained=FILE.')
    if not config.hf_hub_id:
        return str(download(config.url))
    names = [config.hf_hub_filename] if config.hf_hub_filename else ['model.safetensors', 'pytorch_model.bin']
    return hub_file(config.hf_hub_id, names)


def split_projection(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], nn.Module]:
    """Weights of a file -> those of the ViT, and SLIP's projection to the joint space where the file has one."""
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    if 'image_projection' not in weights:
        return weights, nn.Identity()
    head = nn.Linear(*weights['image_projection'].shape, bias=False)
    head.load_state_dict(dict(weight=weights['image_projection'].T))
    return {key[7:]: value for key, value in weights.items() if key.startswith('visual.')}, head


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
    overlay = dict(state_dict=weights, num_classes=0, label_offset=0)
    try:
        vit = timm.create_model(model, pretrained=True, num_classes=0, img_size=size, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        reason = ' '.join(str(error).split())[:400]
        raise InputError(f'{path} does not fit {model} ({reason}); correct model= or pretrained=.') from error
    vit.pretrained_cfg.pop('state_dict')
    return vit
