"""Modules that another module uses but does not own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


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
