"""A hook that applies ``torch.compile`` to any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch._dynamo.config
import torch._functorch.config
from mmcv.cnn.bricks import DropPath
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.distributed.tensor import DTensor

from mmmilan.engine.distributed import transformer_blocks
from mmmilan.errors import warn
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS

# Fraction of the activations that the backward pass keeps. Norms, GELUs and casts, a third of all, are cheap to
# recompute; a smaller fraction would recompute matrix products.
ACTIVATION_MEMORY_BUDGET = 0.8


@HOOKS.register_module()
class CompileHook(Hook):
    """Compile the model, or parts of it, for training.

    State dicts do not change. Evaluation runs uncompiled, as its images differ in size. Without a compiler, training
    runs uncompiled with a warning.

    Args:
        enabled: Whether to compile. None: only on a GPU, as on a CPU compilation takes minutes and gains little.
        parts: Dotted names of the modules and methods to compile. None: the model's ``compiled_parts`` (MILAN: its
            whole loss), each as one graph, or else its ``backbone``. With FSDP the transformer blocks are compiled one
            by one.
        options: Options of ``torch.compile``; ``mode='max-autotune'`` searches for fast kernels and uses CUDA graphs.
    """

    def __init__(self, enabled: bool | None = None, parts: Sequence[str] | None = None, **options) -> None:
        self.enabled = enabled
        self.parts = parts
        self.options = options
        self.compiled = False

    def before_train(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        device = next(model.parameters()).device
        if not (device.type == 'cuda' if self.enabled is None else self.enabled):
            return
        self.compiled = compiles(device, **self.options)
        if self.compiled:
            compile_model(model, self.parts, **self.options)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        # without this mark, CUDA graphs take each part for a new step and reuse the memory of its outputs
        if self.compiled:  # the call imports PyTorch's compiler, which takes seconds
            torch.compiler.cudagraph_mark_step_begin()


def compiles(device: torch.device, **options) -> bool:
    """Whether ``torch.compile`` works on a device; warn if not."""
    try:  # only a compilation shows that the compiler is missing
        torch.compile(torch.sin, **options)(torch.ones(8, device=device))
    except Exception as error:  # its type depends on what is missing: Triton, a C++ compiler, its headers
        reason = str(error).strip().splitlines()[0]
        warn(f'The model runs uncompiled: {reason}')
        return False
    return True


def compile_model(model: nn.Module, parts: Sequence[str] | None = None, **options) -> None:
    """Compile parts of a model, in place, for training with fixed shapes; see :class:`CompileHook`."""
    torch._functorch.config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET  # a global setting
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = float(module.drop_prob)  # mmpretrain's NumPy scalar breaks the graph
    if any(getattr(module, 'with_cp', False) for module in model.modules()):
        torch._dynamo.config.optimize_ddp = False  # it cannot split graphs with activation checkpointing
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        for block in transformer_blocks(model):
            compile_method(block, 'forward', fullgraph=True, **options)
        return
    if parts is None and hasattr(model, 'compiled_parts'):
        parts, options = model.compiled_parts, dict(fullgraph=True) | options
    for part in parts or ('backbone',):
        owner, _, name = part.rpartition('.')
        owner = model.get_submodule(owner) if owner in dict(model.named_modules()) else None
        if isinstance(getattr(owner, name, None), nn.Module):
            owner, name = getattr(owner, name), 'forward'
        if hasattr(owner, name):  # parts that this model does not have are skipped
            compile_method(owner, name, **options)


def compile_method(owner: nn.Module, name: str, **options) -> None:
    """Replace a method by one that runs compiled in training mode and as it was in evaluation mode."""
    plain: Callable = getattr(owner, name)
    compiled = torch.compile(plain, dynamic=False, **options)

    def run(*args, **kwargs):
        return (compiled if owner.training else plain)(*args, **kwargs)

    setattr(owner, name, run)
