"""Mixed precision in bfloat16, and parameters in few groups."""

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
    """Whether a device has products in bfloat16. A CPU without them (AVX2) and a GPU without them (V100, T4) emulate
    them, many times slower."""
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
    """Put all parameters of the same settings into one group, in place. A group's ``param_name`` is no setting."""
    groups: dict[str, dict] = {}
    for group in params:
        settings = {key: value for key, value in group.items() if key not in ('params', 'param_name')}
        groups.setdefault(str(settings), settings | dict(params=[]))['params'].extend(group['params'])
    params[:] = groups.values()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupingOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with all parameters of the same settings in one group.

    MMEngine makes a group of every parameter, so a fused optimizer runs once for each. Same arguments.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        super().add_params(params, module, prefix, **kwargs)
        if not prefix:  # or it was called by itself for a part of the model
            group_by_settings(params)
