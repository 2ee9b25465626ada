"""Mixed precision in bfloat16, and parameters in few groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmmilan.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on GPU or CPU.

    The range of bfloat16 is that of float32, so there is no loss scaling and no skipped step. For GPUs without
    it use MMEngine's ``AmpOptimWrapper``. Arguments of ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupingOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with all parameters of the same settings in one group.

    MMEngine makes a group of every parameter, so a fused optimizer runs once for each. Same arguments.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        super().add_params(params, module, prefix, **kwargs)
        if prefix:  # called by itself for a part of the model
            return
        groups: dict[str, dict] = {}
        for group in params:
            settings = str({key: value for key, value in group.items() if key != 'params'})
            groups.setdefault(settings, group | dict(params=[]))['params'].extend(group['params'])
        params[:] = groups.values()
