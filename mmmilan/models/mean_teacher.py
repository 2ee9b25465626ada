"""The mean teacher: an exponential moving average of a module (arXiv 1703.01780)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mmmilan.models.frozen import Hidden


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
