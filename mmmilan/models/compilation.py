"""``torch.compile`` where there is a compiler."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch._functorch.config
from mmengine.logging import print_log
from torch import nn

# Share of the activations that are kept for the backward pass, of those that make it fastest. Norms, GELUs and casts,
# a third of all, are cheap to compute again; a lower share would have products computed twice.
ACTIVATION_MEMORY_BUDGET = 0.8


def compile_forward(modules: Sequence[nn.Module], device: torch.device, **options) -> None:
    """Compile the ``forward`` of modules for fixed shapes, or leave them as they are, with a warning.

    Args:
        modules: In the order in which a step runs them. Their state dicts stay as they are.
        device: Where they will run.
        options: Of ``torch.compile``; ``mode='max-autotune'`` searches the fastest kernels and uses CUDA graphs.
    """
    try:  # a trial, as a missing compiler shows only when something is compiled
        torch.compile(torch.sin, **options)(torch.ones(8, device=device))
    except Exception as error:  # what is raised depends on what is missing: Triton, a C++ compiler, its headers
        reason = str(error).strip().splitlines()[0]
        print_log(f'Not compiled, the model runs as it is: {reason}', logger='current', level=logging.WARNING)
        return
    torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET  # for all that is compiled from now on
    # or CUDA graphs would take each module for a step of its own, and its outputs for free when the next one runs
    modules[0].register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False, **options)
