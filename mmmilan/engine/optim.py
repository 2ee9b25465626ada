"""Mixed precision in bfloat16, few parameter groups, and mean teachers, which follow the optimizer's steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.runner import Runner
from mmpretrain.engine import LearningRateDecayOptimWrapperConstructor
from mmpretrain.engine.optimizers import LARS as MMPretrainLARS
from torch import Tensor, nn

from mmmilan.errors import InputError, warn
from mmmilan.models.wrapping import MeanTeacher
from mmmilan.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS


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
            warn('This processor has no bfloat16 arithmetic and would be far slower with it; training in float32.')

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


@OPTIMIZERS.register_module()
class LARS(MMPretrainLARS):
    """mmpretrain's LARS without copies from the device; mmpretrain's copies two norms per parameter and step.

    Same arguments and results, except that the ratio of the norms is rounded to float32.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Tensor | None:
        """One step; ``closure`` recomputes the loss and returns it."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            for parameter in group['params']:
                if parameter.grad is not None:
                    parameter.sub_(self.update(parameter, group))
        return loss

    def update(self, parameter: Tensor, group: dict) -> Tensor:
        """The step that is subtracted from a parameter."""
        gradient = parameter.grad.add(parameter, alpha=group['weight_decay'])
        rate = group['lr'] if group.get('lars_exclude') else group['lr'] * self.trust_ratio(parameter, group)
        step = gradient * rate
        if group['momentum'] == 0:
            return step
        state = self.state[parameter]
        if 'momentum_buffer' in state:
            state['momentum_buffer'].mul_(group['momentum']).add_(step, alpha=1 - group['dampening'])
        else:
            state['momentum_buffer'] = step.clone()
        momentum = state['momentum_buffer']
        return step.add(momentum, alpha=group['momentum']) if group['nesterov'] else momentum

    def trust_ratio(self, parameter: Tensor, group: dict) -> Tensor:
        """Norm of the weights over that of the gradient, times ``eta``; 1 where one of them is zero. A scalar."""
        weight, gradient = parameter.norm(), parameter.grad.norm()
        ratio = group['eta'] * weight / (gradient + group['weight_decay'] * weight + self.eps)
        return torch.where((weight > 0) & (gradient > 0), ratio, 1.0)


def depth_in(backbone: nn.Module, name: str) -> tuple[int, int]:
    """Depth of a parameter, and the number of depths; mmpretrain counts a CLIP's norm before the blocks to the head."""
    return backbone.get_layer_depth(name.replace('backbone.pre_norm.', 'backbone.patch_embed.'), prefix='backbone.')


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
            get_layer_depth = partial(depth_in, backbone)
        super().add_params(params, module, prefix, get_layer_depth, **kwargs)
        if not prefix:  # not in a recursive call
            group_by_settings(params)


@HOOKS.register_module()
class MeanTeacherHook(Hook):
    """Update every :class:`MeanTeacher` of the model after each step of the optimizer.

    The momentum rises linearly (a default of this project) from the first iteration to the last.

    Args:
        start: Momentum after the first iteration, 0 <= start < 1.
        end: Momentum after the last iteration.
    """

    def __init__(self, start: float = 0.999, end: float = 0.9999) -> None:
        if not 0 <= start <= end <= 1:
            raise InputError(f'MeanTeacherHook: start={start}, end={end}; choose 0 <= start <= end <= 1.')
        self.start = start
        self.end = end

    def momentum(self, iteration: int, max_iters: int) -> float:
        """Momentum after ``iteration``, counted from 0."""
        return self.start + (self.end - self.start) * iteration / max(1, max_iters - 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not runner.optim_wrapper.should_update():  # gradients were only accumulated
            return
        momentum = self.momentum(runner.iter, runner.max_iters)
        for module in runner.model.modules():
            if isinstance(module, MeanTeacher):
                module.update(momentum)
