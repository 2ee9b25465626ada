"""Layer decay of the learning rate for models of every task."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from mmengine.registry import OPTIMIZERS
from mmpretrain.engine import LearningRateDecayOptimWrapperConstructor
from torch import nn

from mmmilan.engine.optim import group_by_settings
from mmmilan.errors import InputError
from mmmilan.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(LearningRateDecayOptimWrapperConstructor):
    """mmpretrain's constructor, for any model whose ``backbone`` is a ViT: classifiers, detectors, segmentors.

    With L blocks and decay r, the learning rate is multiplied by r^(L+1) for patch embedding, class token and
    positions, by r^(L-i) for block i (from 0), and by 1 for everything after the blocks. mmpretrain's own asks the
    model for ``get_layer_depth``, which only classifiers have, and makes a group for every parameter; here parameters
    with equal settings share a group. ``paramwise_cfg`` is mmpretrain's, with ``layer_decay_rate`` for r.

    Raises:
        InputError: the model's backbone is not a ViT of mmpretrain or of this project.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if self.base_wd is None:  # mmpretrain's needs a number for every group
            kind = self.optimizer_cfg['type']
            optimizer = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
            default = inspect.signature(optimizer).parameters.get('weight_decay')
            self.base_wd = default.default if default else 0.0

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        get_layer_depth: Callable | None = None,
        **kwargs,
    ) -> None:
        if get_layer_depth is None:
            backbone = getattr(module, 'backbone', None)
            if not hasattr(backbone, 'get_layer_depth'):
                raise InputError(
                    f'Layer decay needs a ViT as backbone of {type(module).__name__}, not {type(backbone).__name__}; '
                    'use mmmilan.DenseViT or remove optim_wrapper.constructor.'
                )
            get_layer_depth = partial(backbone.get_layer_depth, prefix='backbone.')
        super().add_params(params, module, prefix, get_layer_depth, **kwargs)
        if not prefix:  # not in a recursive call
            group_by_settings(params)
