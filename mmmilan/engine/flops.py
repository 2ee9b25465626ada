"""Floating-point operations: how many a computation takes, and how many a device can do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dense bfloat16 TFLOP/s with float32 accumulation, from the data sheets. The first key whose words are all in CUDA's
# name of the device counts.
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
# Words in the names of slower variants: for notebooks, for export, slices of a GPU.
SLOWER_VARIANTS = {'Laptop', 'Max', 'D', 'MIG'}


def data_sheet_of(name: str) -> str | None:
    """The key of a device in ``PEAK_TFLOPS``, by CUDA's name of the device; None if it is not in the table."""
    words = set(re.split(r'\W+', name))
    if words & SLOWER_VARIANTS:
        return None
    return next((key for key in PEAK_TFLOPS if words.issuperset(key.split())), None)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak TFLOP/s of a device in dense matrix products; None if it is not in ``PEAK_TFLOPS``."""
    if device.type != 'cuda' or dtype != torch.bfloat16:
        return None
    return PEAK_TFLOPS.get(data_sheet_of(torch.cuda.get_device_name(device)))


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args, **kw) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# PyTorch's own table covers attention on GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the operations in this context; read them with ``get_total_flops()`` of the yielded counter.

    Matrix products, convolutions and attention are counted; a multiply-add counts as two. Compiled modules run
    uncompiled meanwhile. Activations that are recomputed are counted again.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with torch.compiler.set_stance('force_eager'), counter:
        yield counter
