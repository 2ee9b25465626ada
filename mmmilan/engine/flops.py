"""Floating-point operations: how many a computation takes, and how many a device can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dense bfloat16 TFLOP/s of the makers' data sheets, by a part of the name that CUDA gives the device; the first
# that is found counts.
PEAK_TFLOPS = {
    'B200': 2250.0,
    'H200': 989.4,
    'H100 NVL': 835.0,
    'H100 PCIe': 756.0,
    'H100': 989.4,
    'A100': 312.0,
    'A800': 312.0,
    'L40S': 362.0,
    'A40': 149.7,
    'A10G': 70.0,
    'A10': 125.0,
    'RTX 4090': 165.2,
    'RTX 3090': 71.0,
}


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense matrix product TFLOP/s of a device by its data sheet; None where that is not known here."""
    if device.type != 'cuda' or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


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
