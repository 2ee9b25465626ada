"""Modules around modules: wrapped for several processes, frozen, or averaged (arXiv 1703.01780)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, whether or not MMEngine has wrapped it for several processes."""
    return model.module if is_model_wrapper(model) else model


class Hidden:
    """Hides a module from ``nn.Module``'s bookkeeping: no parameter, buffer or child of whoever holds this.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Frozen(nn.Module):
    """A module that is never trained and never saved.

    It is in eval mode and without gradients, and it is not in ``parameters()`` or ``state_dict()``. It does follow the
    model from device to device and from one dtype to another.

    Args:
        module: The module, which is put into eval mode in place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        module.eval()  # mmpretrain's backbones return None from it
        self._hidden = Hidden(module.requires_grad_(False))

    @property
    def module(self) -> nn.Module:
        return self._hidden.module

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any) -> Any:
        """What the module gives."""
        return self.module(*args)


class MeanTeacher(nn.Module):
    """A copy of a module whose weights follow the module's: w' <- m w' + (1 - m) w.

    The weights of the copy are buffers: no optimizer and no gradient reaches them, and checkpoints hold them. The
    copy is always in eval mode. MMEngine's ``ExponentialMovingAverage`` keeps parameters, and its first update
    copies the module whatever the momentum.

    Args:
        student: The module to follow, all of whose weights are parameters.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._student = Hidden(student)
        self.module = copy.deepcopy(student)
        self.module.eval()  # mmpretrain's backbones return None from it
        for module in self.module.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())

    def train(self, mode: bool = True) -> MeanTeacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One step of the average; ``momentum=0`` copies the student."""
        weights, teacher = dict(self._student.module.named_parameters()), dict(self.module.named_buffers())
        torch._foreach_lerp_([teacher[name] for name in weights], list(weights.values()), 1 - momentum)

    @torch.no_grad()
    def forward(self, *args: Tensor) -> Tensor:
        """What the averaged module gives, without gradient."""
        return self.module(*args)
