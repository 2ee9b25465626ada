"""Mixed precision in bfloat16, and few parameter groups."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmmilan.errors import InputError
from mmmilan.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS


def computes_in_bfloat16(device: str) -> bool:
    """Whether a device has bfloat16 arithmetic; others (AVX2 CPUs; V100, T4) emulate it many times slower."""
    if device == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != 'cpu' or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on GPU or CPU.

    The range of bfloat16 is that of float32, so there is no loss scaling and no skipped step. A CPU without it trains
    in float32, with a warning. Arguments of ``OptimWrapper``.

    Raises:
        InputError: the GPU has no bfloat16, and MMEngine's ``AmpOptimWrapper`` (float16) should be used.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.enabled = computes_in_bfloat16(get_device())
        if not self.enabled and get_device() == 'cuda':
            raise InputError(
                f'{torch.cuda.get_device_name()} has no bfloat16 arithmetic; train in float16 with '
                '--cfg-options optim_wrapper.type=AmpOptimWrapper.'
            )
        if not self.enabled:
            message = 'This processor has no bfloat16 arithmetic and would be far slower with it; training in float32.'
            print_log(message, logger='current', level=logging.WARNING)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(get_device(), torch.bfloat16, enabled=self.enabled):
            yield


def group_by_settings(params: list[dict]) -> None:
    """Merge parameter groups with equal settings, in place; ``param_name`` does not count as a setting."""
    groups: dict[str, dict] = {}
    for group in params:
        settings = {key: value for key, value in group.items() if key not in ('params', 'param_name')}
        groups.setdefault(str(settings), settings | dict(params=[]))['params'].extend(group['params'])
    params[:] = groups.values()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupingOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with one group for all parameters with equal settings. Same arguments.

    MMEngine makes a group for every parameter, and a fused optimizer then runs once per parameter.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        super().add_params(params, module, prefix, **kwargs)
        if not prefix:  # not in a recursive call
            group_by_settings(params)
