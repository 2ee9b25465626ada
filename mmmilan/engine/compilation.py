"""``torch.compile`` for any model, by a hook."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch._functorch.config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS

# Share of the activations that are kept for the backward pass, of those that make it fastest. Norms, GELUs and casts,
# a third of all, are cheap to compute again; a lower share would have products computed twice.
ACTIVATION_MEMORY_BUDGET = 0.8


@HOOKS.register_module()
class CompileHook(Hook):
    """Compile parts of the model before training starts.

    In a config: ``default_hooks = dict(compile=dict(type='mmmilan.CompileHook'))``. State dicts stay as they are.
    Without a compiler the model runs as it is, with a warning.

    Args:
        parts: Names of the modules to compile, in the order in which a step runs them. Those that the model does not
            have are left out.
        options: Options of ``torch.compile``; ``mode='max-autotune'`` searches for fast kernels and uses CUDA graphs.
    """

    def __init__(self, parts: Sequence[str] = ('head.teacher', 'backbone', 'neck'), **options) -> None:
        self.parts = parts
        self.options = options

    def before_train(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        modules = [part for part in (find_part(model, name) for name in self.parts) if part is not None]
        compile_forward(modules, next(model.parameters()).device, **self.options)


def find_part(model: nn.Module, name: str) -> nn.Module | None:
    """The module at a dotted name, or None."""
    for attribute in name.split('.'):
        model = getattr(model, attribute, None)
    return model


def compile_forward(modules: Sequence[nn.Module], device: torch.device, **options) -> None:
    """Compile the ``forward`` of modules for fixed shapes, or leave them as they are, with a warning.

    Args:
        modules: In the order in which a step runs them.
        device: Where they will run.
        options: Options of ``torch.compile``.
    """
    try:  # a missing compiler shows only when something is compiled
        torch.compile(torch.sin, **options)(torch.ones(8, device=device))
    except Exception as error:  # what is raised depends on what is missing: Triton, a C++ compiler, its headers
        reason = str(error).strip().splitlines()[0]
        print_log(f'Not compiled, the model runs as it is: {reason}', logger='current', level=logging.WARNING)
        return
    torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET  # for all that is compiled from now on
    # CUDA graphs take each module for a step of its own and reuse its outputs' memory unless told where a step begins
    modules[0].register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False, **options)
