"""Log the speed of a run without slowing it down."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmmilan.engine.log import log_is_due
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS

COUNTED_IMAGES = 4


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Log the speed of training since the last log line, in text and in TensorBoard.

    * ``images_per_s``: over all processes;
    * ``mfu``: model FLOPs utilization, 0 to 1, teacher included unless its output is kept. The operations are counted
      once, on a few images of the first batch. Only for devices whose peak is known;
    * ``data_wait``: share of the time that training waited for data;
    * ``peak_memory_gb``: peak memory of tensors on the GPU, or of the process on a CPU;
    * ``hours_left``: to the end of the run, at this speed; it and the log's ``eta`` include the evaluations to come,
      once the first has been timed.

    Args:
        peak_tflops: Peak TFLOP/s of one device in dense bfloat16 products, for devices that are not in
            :data:`mmmilan.engine.throughput.PEAK_TFLOPS`.
    """

    priority = 'NORMAL'  # after the timer of the default hooks, before the logger

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.flops_per_image: float | None = None
        self.images = self.steps = 0
        self.validations: list[float] = []  # seconds of each

    def before_train(self, runner: Runner) -> None:
        device = next(runner.model.parameters()).device
        self.peak_tflops = self.peak_tflops or peak_tflops(device, torch.bfloat16)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        # after an optimizer step, as counting discards the gradients
        if self.peak_tflops and self.flops_per_image is None and runner.optim_wrapper.should_update():
            self.flops_per_image = flops_per_image(runner, data_batch)
        images = len(data_batch['inputs'])
        self.images += images
        self.steps += 1
        if log_is_due(runner, batch_idx):
            left = self.evaluation_left(runner)
            for name, value in self.measure(runner, left).items():
                runner.message_hub.update_scalar(f'train/{name}', value)
            runner.message_hub.update_info('eta', runner.message_hub.get_info('eta', 0.0) + left)
            self.images = self.steps = 0

    def before_val(self, runner: Runner) -> None:
        self.validations.append(-time.monotonic())

    def after_val(self, runner: Runner) -> None:
        self.validations[-1] += time.monotonic()

    def evaluation_left(self, runner: Runner) -> float:
        """Seconds that evaluations will take until the end of the run, as far as some have been timed."""
        left = sum(hook.seconds_left(runner) for hook in runner.hooks if hasattr(hook, 'seconds_left'))
        if self.validations:
            loop, counts = runner.train_loop, (runner.epoch, runner.max_epochs)
            if isinstance(loop, IterBasedTrainLoop):
                counts = runner.iter, runner.max_iters
            left += fmean(self.validations) * evaluations_left(*counts, loop.val_interval, loop.val_begin)
        return left

    def measure(self, runner: Runner, evaluation_left: float) -> dict[str, float]:
        """The values since the last log line, by name; evaluations will take ``evaluation_left`` seconds."""
        seconds, wait = (
            runner.message_hub.get_scalar(f'train/{name}').mean(self.steps) * self.steps
            for name in ('time', 'data_time')
        )
        rate = self.images / seconds
        values = dict(images_per_s=rate * get_world_size())
        if self.flops_per_image:
            values['mfu'] = rate * self.flops_per_image / (1e12 * self.peak_tflops)
        values['data_wait'] = wait / seconds
        values['peak_memory_gb'] = peak_memory() / 1e9
        steps_left = runner.max_iters - runner.iter - 1
        values['hours_left'] = (steps_left * seconds / self.steps + evaluation_left) / 3600
        return values


def evaluations_left(done: int, end: int, interval: int, begin: int = 1) -> int:
    """How many evaluations come after ``done`` epochs of ``end``: at multiples of an interval, and at the end.

    Args:
        done: Epochs (or iterations) so far.
        end: Epochs of the run.
        interval: Epochs between two evaluations.
        begin: The first epoch that may have one.
    """
    multiples = end // interval - max(done, begin - 1) // interval
    return max(0, multiples) + (done < end and end >= begin and end % interval > 0)


def flops_per_image(runner: Runner, data_batch: dict) -> float:
    """FLOPs of the forward and backward pass for one image, counted on a few images to save memory.

    Training is not affected: weights, buffers and random states (CPU and GPU) are unchanged, gradients zero.
    """
    model, wrapper = runner.model, runner.optim_wrapper
    inner = unwrap(model)
    part = {key: value[:COUNTED_IMAGES] for key, value in data_batch.items()}
    buffers = {buffer: buffer.clone() for buffer in inner.buffers()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), counted_flops() as counter:
        with wrapper.optim_context(model):
            losses = model(**inner.data_preprocessor(part, training=True), mode='loss')
        inner.parse_losses(losses)[0].backward()
    wrapper.zero_grad()
    for buffer, value in buffers.items():
        buffer.copy_(value)
    return counter.get_total_flops() / len(part['inputs'])


def peak_memory() -> int:
    """Peak memory in bytes: of tensors on the GPU, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


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
