"""Load weights of any layout into a model; refuse what does not fit.

There is one set of rules, :func:`load_weights`, for the encoder of a new model (``init_cfg``, in any process), for a
whole model (``load_from``, ``resume``, ``tools/test.py``) and for ``mmmilan.get_model``. A sharded model (DTensor)
takes its part of full tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import CheckpointLoader, get_external_models, get_torchvision_models
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from mmmilan.checkpoints.io import check_values, get_state_dict, load_checkpoint_file
from mmmilan.checkpoints.layouts import (
    convert,
    detect_layout,
    find_models,
    from_open_clip,
    is_clip_tower,
    without_prefix,
)
from mmmilan.checkpoints.positions import fit_positions
from mmmilan.checkpoints.zoo import resolve_checkpoint
from mmmilan.errors import InputError, listed

# Weights that an encoder may have and its pretraining did not: the norm after the mean of the patch tokens, relative
# positions, layer scale, and the layers of DenseViT that rescale its maps.
_MAY_BE_MISSING = re.compile(
    r'ln2\.\w+|layers\.\d+\.attn\.(rel_pos_\w+|gamma1\.\w+)|layers\.\d+\.ffn\.gamma2\.\w+|rel_pos_shared\.\w+|scales\..+'
)
# Pretrained weights that an encoder may not use: the norms after its last layer, and the class token.
_MAY_BE_UNUSED = re.compile(r'ln[12]\.\w+|cls_token')


def load_weights(
    module: nn.Module, checkpoint: dict[str, Any], source: str, prefix: str | None = None
) -> dict[str, Tensor]:
    """Load all weights of a module.

    * Every weight of the module must be in the checkpoint. An encoder on its own (mmpretrain's ``VisionTransformer``,
      ``MILANViT``, ``DenseViT``) may have new parts, see ``_MAY_BE_MISSING``.
    * Every weight of the checkpoint's encoder must have a place in the module's, see ``_MAY_BE_UNUSED``.
    * Other weights of the checkpoint (a decoder, a head) are not loaded; the log names them.

    Positions of another image size are interpolated. Of a grid that is no square, only sines and cosines tell the rows.

    Args:
        module: An encoder, or a whole model such as a classifier or a detector.
        checkpoint: Content of the file, in any layout.
        source: Name of the checkpoint in messages.
        prefix: Load only the weights under this prefix of this project's layout, such as 'backbone'. None: look for the
            module's keys without a prefix, and then under ``backbone.``.

    Returns:
        All weights of the checkpoint, in this project's layout.

    Raises:
        InputError: no weight fits, a weight is missing or has another shape, or a layer of the encoder is left over.
    """
    name, wanted = type(module).__name__, set(module.state_dict())
    weights = get_state_dict(checkpoint, source)
    if not wanted <= set(weights):
        weights = as_mmmilan(weights, source)
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    if prefix is None:
        prefix = '' if wanted & set(weights) else 'backbone.'
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not wanted & set(found):
        begin = ', '.join(sorted({key.partition('.')[0] for key in weights})[:6])
        raise InputError(
            f'{source} holds no weight of {name} under {prefix!r} (its keys begin with {begin}); give another '
            'checkpoint or prefix.'
        )
    missing, unused = wanted - set(found), set(found) - wanted
    check_complete(module, missing, unused, source)
    check_values({key: found[key] for key in wanted - missing}, source, module.state_dict())
    try:
        module.load_state_dict(shard_weights(module, fit_positions(module, found)), strict=False)
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:  # positions of odd shapes raise the others
        misfits = re.findall(r'size mismatch for (\S+):', str(error))
        fault = class_count(module, found, misfits) or f'{" ".join(str(error).split())}; give a matching checkpoint.'
        raise InputError(f'{source} does not fit {name}: {fault}') from error
    print_log(
        f'{name}: {len(wanted - missing)} of {len(wanted)} weights loaded from {source}; newly initialised: '
        f'{some(missing)}; not used: {some(unused)}.',
        logger='current',
    )
    return weights


def check_complete(module: nn.Module, missing: set[str], unused: set[str], source: str) -> None:
    """Refuse a checkpoint that fits only in part, see :func:`load_weights`.

    Raises:
        InputError: weights are missing or left over.
    """
    from mmpretrain.models import VisionTransformer

    if isinstance(module, VisionTransformer):
        check_encoder(module, missing, unused, source)
        return
    of_encoder = {key.removeprefix('backbone.') for key in unused if key.startswith('backbone.')}
    is_vit = isinstance(getattr(module, 'backbone', None), VisionTransformer)
    if missing or (is_vit and not all(map(_MAY_BE_UNUSED.fullmatch, of_encoder))):
        raise InputError(
            f'{source} does not hold all of {type(module).__name__}: missing {some(missing)}, left over '
            f'{some(unused)}; give a checkpoint of this config, or start training from an encoder by '
            'model.backbone.init_cfg.checkpoint.'
        )


def check_encoder(encoder: nn.Module, missing: set[str], unused: set[str], source: str) -> None:
    """Refuse a start that lacks a layer of the encoder, or has one more; new parts of a downstream encoder may lack.

    Raises:
        InputError: weights are missing or left over.
    """
    missing = {key for key in missing if not _MAY_BE_MISSING.fullmatch(key)}
    left_over = {key for key in unused if not _MAY_BE_UNUSED.fullmatch(key)}
    if missing or left_over:
        raise InputError(
            f'{source} does not hold all of {type(encoder).__name__}: missing {some(missing)}, left over '
            f'{some(left_over)}; give the checkpoint of a model with the same layers, or change arch.'
        )


def class_count(model: nn.Module, weights: dict[str, Tensor], misfits: list[str]) -> str:
    """Cause and remedy if only the number of classes differs; else ''."""
    counting = [name for name, module in model.named_modules() if hasattr(module, 'num_classes')]
    heads = {name for name in counting if any(key.startswith(f'{name}.') for key in misfits)}
    if not misfits or not all(key.startswith(tuple(f'{name}.' for name in heads)) for key in misfits):
        return ''
    key = misfits[0]
    shapes = f'{list(weights[key].shape)}, and {list(model.state_dict()[key].shape)} in the model'
    # mmpretrain's data preprocessor has to know as well
    options = [f'model.{name}.num_classes' for name in counting if name in heads | {'data_preprocessor'}]
    return f'its {key} is {shapes}; set {" and ".join(options)} to the number of classes that it was trained for.'


def as_mmmilan(weights: dict[str, Tensor], source: str = 'The checkpoint') -> dict[str, Tensor]:
    """Convert weights of a ViT, also that of a CLIP, to this project's layout; others are returned unchanged.

    Raises:
        InputError: several ViTs are among them, or the ViT has parts that no layout has.
    """
    if not find_models(weights):
        return from_open_clip(weights) if is_clip_tower(weights) else weights
    try:
        layout = detect_layout(weights)
        converted = without_prefix(weights) if layout.name in ('mmmilan', 'openmmlab') else convert(weights)
    except InputError as error:
        raise InputError(f'{source}: {error}') from error
    if layout.dropped:
        print_log(f'{source} holds {layout}.', logger='current')
    return converted


def some(names: set[str]) -> str:
    """Up to six of the names, for a message."""
    return listed(sorted(names), 6) or 'none'


def read_checkpoint(name: str | os.PathLike, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint as data.

    Args:
        name: A file, a URL (its hash is checked), a model of the zoo, or one of MMEngine's, such as
            'torchvision://resnet50'.
        map_location: As for ``torch.load``; by default the CPU.

    Raises:
        InputError: there is no such checkpoint, or reading it would run code.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise InputError(f'checkpoint={name!r} names no checkpoint; give a file, a URL or a model of the zoo.')
    name = os.fspath(name)
    scheme, separator, rest = name.partition('://')
    if separator and scheme in ('modelzoo', 'torchvision', 'open-mmlab', 'openmmlab'):
        urls = get_torchvision_models() if scheme in ('modelzoo', 'torchvision') else get_external_models()
        if rest not in urls:
            raise InputError(f'{name} is unknown to MMEngine; give a URL or a file.')
        name = urls[rest]
    elif separator and scheme not in ('file', 'http', 'https'):
        raise InputError(f'{name} cannot be read safely from a {scheme}:// address; copy it to a file.')
    return load_checkpoint_file(resolve_checkpoint(name), map_location=map_location or 'cpu')


class PretrainedWeights(PretrainedInit):
    """MMEngine's ``init_cfg=dict(type='Pretrained', ...)``, by the rules of :func:`load_weights`.

    Args:
        checkpoint: See :func:`read_checkpoint`.
        prefix: See :func:`load_weights`.
        map_location: Device of the weights while they are loaded.

    Raises:
        InputError: when called, see :func:`load_weights`.
    """

    def __call__(self, module: nn.Module) -> None:
        load_weights(module, read_checkpoint(self.checkpoint, self.map_location), self.checkpoint, self.prefix)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())


def is_pretrained(kind: str | type) -> bool:
    """Whether the type of an ``init_cfg`` is MMEngine's ``Pretrained``, by any name: 'mmengine.Pretrained', its class.

    MMEngine itself knows 'Pretrained' and the class; by another name it would initialise the module after loading.
    """
    kind = WEIGHT_INITIALIZERS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, PretrainedInit)


@contextmanager
def exact_initialisation(module: BaseModule) -> Iterator[None]:
    """Initialise an encoder in this context; then load the checkpoint of its ``init_cfg`` by :func:`load_weights`.

    In a process without :func:`use_safe_loading`, such as mmdet's own ``tools/train.py``, MMEngine would read the
    checkpoint as a pickle, load the weights whose name and shape fit, and leave the others random.
    """
    init_cfg = module.init_cfg
    every = [init_cfg] if isinstance(init_cfg, dict) else list(init_cfg or [])
    pretrained = [cfg for cfg in every if is_pretrained(cfg.get('type', 'Pretrained'))]
    module.init_cfg = [cfg for cfg in every if cfg not in pretrained]
    yield
    module.init_cfg = init_cfg
    for cfg in pretrained:
        PretrainedWeights(**{key: value for key, value in cfg.items() if key != 'type'})(module)


def use_safe_loading() -> None:
    """Make MMEngine read every checkpoint of this process (``load_from``, ``resume``) by :func:`read_checkpoint`.

    An ``init_cfg`` of type ``Pretrained`` then loads by :func:`load_weights` into any module.
    """
    schemes = {'', *CheckpointLoader._schemes}
    CheckpointLoader.register_scheme(list(schemes), read_checkpoint, force=True)
    WEIGHT_INITIALIZERS.register_module('Pretrained', force=True, module=PretrainedWeights)


def shard_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full ``tensor`` like ``like``; unchanged if ``like`` is not sharded or has another shape."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shard full weights as ``model`` shards its own, for its ``load_state_dict``."""
    own = model.state_dict()
    return {key: shard_as(value, own[key]) if key in own else value for key, value in weights.items()}


def gather(tree: Any) -> Any:
    """Replace shards in nested dicts and lists by full tensors, on the CPU of the main process. A collective call."""

    def whole(tensor: Tensor) -> Tensor | None:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.detach().cpu() if is_main_process() else None

    return tree_map_only(Tensor, whole, tree)
