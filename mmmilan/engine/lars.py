"""LARS (arXiv 1708.03888), as linear probing uses it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mmpretrain.engine.optimizers import LARS as MMPretrainLARS
from torch import Tensor

from mmmilan.registry import OPTIMIZERS


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
