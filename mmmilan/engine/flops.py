"""Floating-point operations: how many a computation takes, and how many a device can do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dense bfloat16 TFLOP/s of the makers' data sheets, products accumulated in float32, by words of the name that CUDA
# gives the device; the first whose words are all in it counts.
PEAK_TFLOPS = {
    'GB300': 2500.0,
    'B300': 2250.0,
    'GB200': 2500.0,
    'B200': 2250.0,
    'H200 NVL': 835.5,
    'H200': 989.4,
    'GH200': 989.4,
    'H100 NVL': 835.5,
    'H100 PCIe': 756.5,
    'H100': 989.4,
    'H800 PCIe': 756.5,
    'H800': 989.4,
    'H20': 148.0,
    'A100': 312.0,
    'A800': 312.0,
    'A30': 165.0,
    'L40S': 362.0,
    'L40': 181.0,
    'L4': 121.0,
    'A40': 149.7,
    'A10G': 70.0,
    'A10': 125.0,
    'RTX A6000': 154.8,
    'RTX 5090': 209.5,
    'RTX 4090': 165.2,
    'RTX 3090 Ti': 80.0,
    'RTX 3090': 71.0,
}
# Words of names of devices that are less than their namesake: for a notebook, for export, a part of one.
LESS = {'Laptop', 'Max', 'D', 'MIG'}


def data_sheet_of(name: str) -> str | None:
    """The key in ``PEAK_TFLOPS`` of a device, by the name that CUDA gives it; None if it has none."""
    words = set(re.split(r'\W+', name))
    if words & LESS:
        return None
    return next((key for key in PEAK_TFLOPS if words.issuperset(key.split())), None)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense matrix product TFLOP/s of a device by its data sheet; None where that is not known here."""
    if device.type != 'cuda' or dtype != torch.bfloat16:
        return None
    return PEAK_TFLOPS.get(data_sheet_of(torch.cuda.get_device_name(device)))


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args, **kw) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# PyTorch's own table has the attention of GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count what runs in this context; ``get_total_flops()`` of the yielded counter tells.

    Matrix products, convolutions and attention are counted, a multiplication with its addition as two. Compiled
    modules run uncompiled meanwhile. What activation checkpointing computes again is counted again.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with torch.compiler.set_stance('force_eager'), counter:
        yield counter
