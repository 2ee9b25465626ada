"""Simulate a CUDA device with PyTorch's fake tensors, to see what a training step would do on one.

Fake tensors have a shape, a dtype and a device but no memory and no values, so a step of real size runs in seconds on a
CPU. :class:`Watch` records each of its operations.
"""

from __future__ import annotations

import linecache
import traceback
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CUDA, CPU = torch.device('cuda', 0), torch.device('cpu')
# Operations for which the host waits until the device has computed a value or a shape.
WAITING = {'_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero', 'masked_select', '_unique2', 'repeat_interleave'}
PACKAGES = {'mmmilan', 'mmpretrain', 'mmengine', 'mmcv', 'mmseg', 'mmdet', 'open_clip', 'timm'}


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Within this context tensors are fake, and PyTorch seems to have a CUDA device with bfloat16, such as an A100."""
    patches = {
        'torch.cuda.amp.common.amp_definitely_not_available': lambda: False,
        'torch.cuda.is_bf16_supported': lambda including_emulation=True: True,
        'torch.cuda.current_device': lambda: 0,
        'mmmilan.engine.optim.get_device': lambda: 'cuda',
        'torch.nn.Module._apply': apply,
    }
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FusedAttention():
        for name, function in patches.items():
            patch = mock.patch(name, function)
            patch.start()
        try:
            yield mode
        finally:
            mock.patch.stopall()


class FusedAttention(TorchFunctionMode):
    """Attention by the fused kernels of a GPU; without a GPU, PyTorch would choose plain matrix products."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].device == CUDA:
            return fused_attention(*args, **kwargs)
        return func(*args, **kwargs)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs,
) -> Tensor:
    """Flash attention; with a mask or in float32, memory-efficient attention."""
    if torch.is_autocast_enabled('cuda'):
        query, key, value = (each.to(torch.get_autocast_dtype('cuda')) for each in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
    if attn_mask is not None:
        bias = attn_mask if attn_mask.is_floating_point() else torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)[0]


def apply(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` that makes new parameters and buffers, as fake ones cannot be changed in place."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer.detach())
    return module


def to_fake(model: nn.Module) -> nn.Module:
    """Move a model from the CPU to the simulated device."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=CUDA))
    for module in model.modules():
        if isinstance(module, BaseDataPreprocessor):
            module._device = CUDA
    return model


@dataclass
class Operation:
    """One operation on the device.

    Attributes:
        name: PyTorch's name.
        reads: Number of each storage that it reads -> bytes.
        writes: Number of each storage that it writes -> bytes.
        flops: Floating-point operations of a matrix product, a convolution or attention; else 0.
        dtype: The dtype of its first tensor.
    """

    name: str
    reads: dict[int, int]
    writes: dict[int, int]
    flops: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


class Watch(TorchDispatchMode):
    """Within this context, inside that of :func:`fake_cuda`, each operation is recorded.

    Attributes:
        waits: Place where the host would wait for the device -> how often it would.
        operations: The operations that would run on the device.
        allocated: Bytes of the tensors on the device now.
        peak: The maximum of ``allocated``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations: list[Operation] = []
        self.pinned: weakref.WeakSet = weakref.WeakSet()
        self.numbers: weakref.WeakSet = weakref.WeakSet()
        self.alive: dict[int, int] = {}  # address of each storage on the device -> its number
        self.allocated = self.peak = self.number = 0

    def hold(self, tree: Any) -> None:
        """Count the memory of tensors that exist already."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and tensor.device == CUDA:
                self.count(tensor)

    def pin(self, tensor: Tensor) -> Tensor:
        """Treat a tensor on the host as one in pinned memory, as a data loader returns."""
        self.pinned.add(tensor.untyped_storage())
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition('::')
        if namespace == 'prim':  # it reads a property
            return func(*args, **kwargs)
        if name == '_pin_memory':
            return self.pin(args[0].clone())
        if name == 'is_pinned':
            return args[0].untyped_storage() in self.pinned
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        answer = self.look_for_wait(name, args, kwargs, inputs)
        result = answer if answer is not None else func(*args, **kwargs)
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if name == 'lift_fresh' and not result.ndim:
            self.numbers.add(result.untyped_storage())
        for each in outputs:
            self.count(each)
        inputs, outputs = ([each for each in tensors if each.device == CUDA] for tensors in (inputs, outputs))
        if (inputs or outputs) and not func.is_view and not name.startswith(('empty', 'new_empty', 'detach')):
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            dtype = (inputs or outputs)[0].dtype
            self.operations.append(Operation(name, self.sizes(inputs), self.sizes(outputs), flops, dtype))
        return result

    def look_for_wait(self, name: str, args: tuple, kwargs: dict, inputs: list[Tensor]) -> Any:
        """Record a wait; return a value for operations that need one, as fake tensors have no values."""
        on_device = any(each.device == CUDA for each in inputs)
        if name in WAITING and on_device:
            self.wait(name)
        if name in ('is_nonzero', 'equal'):
            return True
        if name == '_local_scalar_dense':  # also on the host
            return 1.0 if inputs[0].is_floating_point() else 1
        if name in ('index', 'index_put', 'index_put_') and on_device:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait(f'{name} by a mask')
            if any(index.device == CPU for index in indices):
                self.wait(f'{name} by a list or by indices on the host')
        # only with fake tensors, a number that is assigned, as in x[0] = 1, is a tensor on the host
        if name == '_to_copy' or (name == 'copy_' and args[1].untyped_storage() not in self.numbers):
            target = args[0].device if name == 'copy_' else kwargs.get('device') or args[0].device
            source = args[1] if name == 'copy_' else args[0]
            asynchronous = args[2] if name == 'copy_' and len(args) > 2 else kwargs.get('non_blocking', False)
            if source.device.type != torch.device(target).type:
                to_device = torch.device(target).type == 'cuda'
                if not asynchronous or (to_device and source.untyped_storage() not in self.pinned):
                    self.wait('copy to the device' if to_device else 'copy to the host')
        return None

    def wait(self, what: str) -> None:
        """Record a wait at the current line of the model's code."""
        self.waits[f'{what}: {place()}'] += 1

    def count(self, tensor: Tensor) -> None:
        """Count the memory of a tensor on the device until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device == CUDA and key not in self.alive:
            size = -(-storage.nbytes() // 512) * 512  # as PyTorch's allocator rounds
            self.number += 1
            self.alive[key] = self.number
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        """Called when a storage is freed."""
        del self.alive[key]
        self.allocated -= size

    def sizes(self, tensors: list[Tensor]) -> dict[int, int]:
        """Number of each tensor's storage -> bytes of the tensor; storages that are not counted have number 0."""
        return {
            self.alive.get(each.untyped_storage()._cdata, 0): each.numel() * each.element_size() for each in tensors
        }


def place() -> str:
    """The innermost line on the stack in a module of ``PACKAGES``, wherever their files are."""
    for frame, number in traceback.walk_stack(None):  # the innermost first
        module = frame.f_globals.get('__name__', '')
        if module.partition('.')[0] in PACKAGES:
            line = linecache.getline(frame.f_code.co_filename, number).strip()
            return f'{module.replace(".", "/")}.py:{number} {line}'
    return 'elsewhere'


def backward(losses: list[Tensor]) -> None:
    """``losses.pop().backward()`` in Python, as PyTorch's own engine needs a context of the device."""
    loss = losses.pop()
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    order = topological(loss.grad_fn)
    del loss
    # activation checkpointing recomputes a block once per backward pass, which it recognises by this id
    one_pass = mock.patch('torch._C._current_graph_task_id', lambda: 0)
    with torch.no_grad(), one_pass:
        while order:
            node = order.pop()
            received = gradients.pop(node, None)
            if received is None:
                continue
            if hasattr(node, 'variable'):
                variable = node.variable
                variable.grad = received[0] if variable.grad is None else variable.grad + received[0]
                continue
            given = node(*(received.get(i) for i in range(len(node._input_metadata))))
            given = given if isinstance(given, tuple) else (given,)
            for (following, index), gradient in zip(node.next_functions, given, strict=True):
                if following is not None and gradient is not None:
                    wanted = following._input_metadata[index]
                    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)  # reverses broadcasting
                    slots = gradients[following]
                    slots[index] = gradient if index not in slots else slots[index] + gradient
            del node, received, given, gradient  # frees the tensors that were saved for the backward pass


def topological(root: Any) -> list:
    """The nodes of an autograd graph, each before the nodes that it gets gradients from; the root is last."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions if following is not None)
    return order


def train_step(model: nn.Module, wrapper: OptimWrapper, data: dict) -> dict[str, Tensor]:
    """MMEngine's ``train_step`` with :func:`backward`; returns the losses to log."""
    with wrapper.optim_context(model):
        losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    loss, log = model.parse_losses(losses)
    log = {key: value.detach() for key, value in log.items()}
    pending = [loss]
    del loss, losses
    backward(pending)
    wrapper.step()
    wrapper.zero_grad()
    return log
