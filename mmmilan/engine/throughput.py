"""Log the speed of a run without slowing it down."""

from __future__ import annotations

import resource
import sys

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook, LoggerHook, RuntimeInfoHook
from mmengine.runner import Runner
from torch import Tensor

from mmmilan.engine.flops import counted_flops, peak_tflops
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS

COUNTED_IMAGES = 4


def log_is_due(runner: Runner, batch_idx: int) -> bool:
    """Whether MMEngine's ``LoggerHook`` may write a line after this step."""
    interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 1)
    return (batch_idx + 1) % interval == 0 or batch_idx + 1 == len(runner.train_dataloader)


@HOOKS.register_module()
class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """MMEngine's ``RuntimeInfoHook``, but losses are copied from the GPU only when a log line is due.

    MMEngine's hook copies them after every step, and so waits for the GPU before the next step. The losses of all steps
    are still logged. In a config: ``default_hooks.runtime_info``.
    """

    def __init__(self) -> None:
        self.pending: list[dict] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        # a copy, as a later step may write to the same memory
        self.pending.append({k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in outputs.items()})
        if log_is_due(runner, batch_idx):
            for outputs in self.pending:
                super().after_train_iter(runner, batch_idx, data_batch, outputs)
            self.pending.clear()


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Log the speed of training since the last log line, in text and in TensorBoard.

    * ``images_per_s``: over all processes; with several masks an image, ``masked_views_per_s`` too;
    * ``mfu``: model FLOPs utilization, 0 to 1, teacher included. The operations are counted once, on a few images of
      the first batch. Only for devices whose peak is known;
    * ``data_wait``: share of the time that training waited for data;
    * ``peak_memory_gb``: peak memory of tensors on the GPU, or of the process on a CPU;
    * ``hours_left``: to the end of the run, at this speed.

    Args:
        peak_tflops: Peak TFLOP/s of one device in dense bfloat16 products, for devices that are not in
            :data:`mmmilan.engine.flops.PEAK_TFLOPS`.
    """

    priority = 'NORMAL'  # after the timer of the default hooks, before the logger

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self.flops_per_image: float | None = None
        self.images = self.steps = 0

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
            for name, value in self.measure(runner).items():
                runner.message_hub.update_scalar(f'train/{name}', value)
            self.images = self.steps = 0

    def measure(self, runner: Runner) -> dict[str, float]:
        """The values since the last log line, by name."""
        seconds, wait = (
            runner.message_hub.get_scalar(f'train/{name}').mean(self.steps) * self.steps
            for name in ('time', 'data_time')
        )
        rate = self.images / seconds
        values = dict(images_per_s=rate * get_world_size())
        masks_per_image = getattr(unwrap(runner.model), 'masks_per_image', 1)
        if masks_per_image > 1:
            values['masked_views_per_s'] = values['images_per_s'] * masks_per_image
        if self.flops_per_image:
            values['mfu'] = rate * self.flops_per_image / (1e12 * self.peak_tflops)
        values['data_wait'] = wait / seconds
        values['peak_memory_gb'] = peak_memory() / 1e9
        values['hours_left'] = (runner.max_iters - runner.iter - 1) * seconds / self.steps / 3600
        return values


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
