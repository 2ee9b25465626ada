"""Weights into an encoder (``init_cfg=dict(type='Pretrained', ...)``) or a whole model: any layout, none in silence."""

from __future__ import annotations

import re
from typing import Any

from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit, update_init_info
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmmilan.checkpoints.io import get_state_dict
from mmmilan.checkpoints.layouts import convert, detect_layout
from mmmilan.errors import InputError

# What an encoder may have that pretraining had not: the norm after the mean of the patch tokens, relative positions,
# layer scale, and the layers of DenseViT that rescale its maps.
_NEW = re.compile(r'ln2\.\w+|layers\.\d+\.attn\.(rel_pos_\w+|gamma1\.\w+)|layers\.\d+\.ffn\.gamma2\.\w+|scales\..+')
# What an encoder may have no use for: the norms after its last layer.
_FINAL_NORM = re.compile(r'ln[12]\.\w+')


class PretrainedWeights(PretrainedInit):
    """Loads the weights of a module from a checkpoint in any layout.

    An encoder (mmpretrain's ``VisionTransformer``, ``MILANViT``, ``DenseViT``) is loaded whole or not at all; positions
    of another image size are interpolated. Of other modules, what the checkpoint has is loaded.

    Args:
        checkpoint: file, URL, or name of a model of the zoo.
        prefix: the part to take, in this project's layout. By default the whole module's keys are looked for as they
            are, and then under ``backbone.``.
        map_location: where to put them first.

    Raises:
        InputError: on the call, if no weight of the module is in the checkpoint, a shape differs, or only a part of
            an encoder fits.
    """

    def __call__(self, module: nn.Module) -> None:
        checkpoint = CheckpointLoader.load_checkpoint(self.checkpoint, self.map_location)
        weights = as_mmmilan(get_state_dict(checkpoint))
        wanted = set(module.state_dict())
        prefix = self.prefix
        if prefix is None:
            prefix = '' if wanted & set(weights) else 'backbone.'
        prefix = f'{prefix.rstrip(".")}.' if prefix else ''
        found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if not wanted & set(found):
            raise InputError(
                f'{self.checkpoint} holds no weight of {type(module).__name__} under {prefix!r}: its keys begin with '
                f'{", ".join(sorted({key.partition(".")[0] for key in weights}))}'
            )
        self._check_encoder(module, wanted - set(found), set(found) - wanted)
        try:
            missing, unused = module.load_state_dict(found, strict=False)
        except (RuntimeError, AssertionError) as error:  # the latter for positions that are no square
            raise InputError(f'{self.checkpoint} does not fit: {" ".join(str(error).split())}') from error
        loaded = f'{len(wanted) - len(missing)} of {len(wanted)} weights of {type(module).__name__}'
        message = (
            f'{loaded} are those of {self.checkpoint}; as initialised: {_some(missing)}; not used: {_some(unused)}'
        )
        print_log(message, logger='current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())

    def _check_encoder(self, module: nn.Module, missing: set[str], unused: set[str]) -> None:
        """Refuse a checkpoint that fits an encoder in part."""
        from mmpretrain.models import VisionTransformer

        if not isinstance(module, VisionTransformer):
            return
        missing = sorted(key for key in missing if not _NEW.fullmatch(key))
        unused = sorted(key for key in unused if not _FINAL_NORM.fullmatch(key))
        if missing or unused:
            raise InputError(
                f'{self.checkpoint} fits {type(module).__name__} only in part: missing {_some(missing)}; '
                f'left over {_some(unused)}: give the checkpoint of a model with the same layers, or change arch'
            )


def load_model(model: nn.Module, checkpoint: dict[str, Any], source: str) -> dict[str, Tensor]:
    """Load all weights of a model; what the checkpoint has beyond them is only logged.

    Args:
        model: the whole model, such as a classifier or a detector.
        checkpoint: what the file holds, in any layout.
        source: what messages call it.

    Returns:
        The checkpoint's weights in this project's layout.

    Raises:
        InputError: a weight of the model is missing, or has another shape (as the head of other classes).
    """
    weights = as_mmmilan(get_state_dict(checkpoint))
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    name = type(model).__name__
    try:
        missing, unused = model.load_state_dict(weights, strict=False)
    except (RuntimeError, AssertionError) as error:  # the latter for positions that are no square
        misfits = re.findall(r'size mismatch for (\S+):', str(error))
        fault = _class_count(model, weights, misfits) or ' '.join(str(error).split())
        raise InputError(f'{source} does not fit: {fault}') from error
    if missing:
        raise InputError(
            f'{source} does not hold all of {name}: missing {_some(missing)}; left over {_some(unused)}: give a '
            'checkpoint of this config, or start training from an encoder by model.backbone.init_cfg.checkpoint'
        )
    print_log(f'All weights of {name} are those of {source}; not used: {_some(unused)}', logger='current')
    return weights


def _class_count(model: nn.Module, weights: dict[str, Tensor], misfits: list[str]) -> str:
    """What to do, if nothing but heads of another number of classes is in the way."""
    counting = [name for name, module in model.named_modules() if hasattr(module, 'num_classes')]
    heads = {name for name in counting if any(key.startswith(f'{name}.') for key in misfits)}
    if not misfits or not all(key.startswith(tuple(f'{name}.' for name in heads)) for key in misfits):
        return ''
    key = misfits[0]
    shapes = f'{list(weights[key].shape)}, and {list(model.state_dict()[key].shape)} in the model'
    # mmpretrain's data preprocessor has to know as well
    options = [f'model.{name}.num_classes' for name in counting if name in heads | {'data_preprocessor'}]
    return f'its {key} is {shapes}: set {" and ".join(options)} to the number of classes that it was trained for'


def as_mmmilan(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ViT in this project's layout, other weights as they are."""
    try:
        layout = detect_layout(weights)
    except InputError:
        return weights
    return weights if layout.name in ('mmmilan', 'openmmlab') else convert(weights)


def _some(names: list[str]) -> str:
    more = f' and {len(names) - 6} more' if len(names) > 6 else ''
    return ', '.join(names[:6]) + more if names else 'none'
