"""A loss that is not finite: it ends the run, and reaches neither the weights nor a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from mmengine.dist import all_gather, all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mmmilan.engine.log import log_is_due
from mmmilan.errors import InputError
from mmmilan.registry import HOOKS


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop all processes when a loss is not finite, before it reaches the weights.

    Before each step of the optimizer, gradients of which any is not finite are replaced by zeros, on the device and
    without waiting for it. The run then ends: on a CPU at once, on a GPU when a log line is due, which is when the host
    sees the losses. With float16's loss scaling such gradients are part of the method, and MMEngine skips the step.

    Raises:
        InputError: naming the first bad step and the last good checkpoint.
    """

    priority = 'NORMAL'  # the checkpoint hook comes later, so the bad weights are never written

    def __init__(self) -> None:
        self.finite: Tensor | None = None  # whether the gradients of the last step were, bool []
        self.state: Tensor | None = None  # step, loss and ``finite`` of the last step, or of the first bad one

    def before_train(self, runner: Runner) -> None:
        if not hasattr(runner.optim_wrapper, 'loss_scaler'):
            runner.optim_wrapper.optimizer.register_step_pre_hook(self.before_step)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Replace gradients by zeros if any is not finite."""
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        some = [
            torch.zeros(1, device=local[0].device),
            *(each for each in local if each.numel()),
        ]  # or empty shards
        finite = torch.stack(torch._foreach_norm(some, ord=math.inf)).isfinite().all().float()
        if any(isinstance(gradient, DTensor) for gradient in gradients):
            all_reduce(finite, op='min')  # each process has seen its own shards
        self.finite = finite.bool()
        for gradient in local:
            gradient.masked_fill_(~self.finite, 0)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        loss = outputs['loss'].detach()
        finite = torch.ones_like(loss) if self.finite is None else self.finite.to(loss)
        state = torch.stack([torch.full_like(loss, runner.iter + 1), loss, finite])
        self.state = state if self.state is None else torch.where(is_good(self.state), state, self.state)
        # gradients are the same on all processes, so on a CPU all of them come here after the same step
        if log_is_due(runner, batch_idx) or (loss.device.type == 'cpu' and not finite):
            # one process with a bad loss spoils the gradients of all
            bad = [state for state in torch.stack(all_gather(self.state)) if not is_good(state)]
            if bad:
                iteration, loss, _ = min((state.tolist() for state in bad), key=lambda state: state[0])
                fault = f'The loss is {loss}' if not math.isfinite(loss) else 'The gradients are not finite'
                self.stop(runner, f'{fault} at iteration {int(iteration)} (epoch {runner.epoch + 1})')

    def after_train_epoch(self, runner: Runner) -> None:
        # the last step may have broken the weights, which only the next loss would show
        finite = all_finite(runner.model.parameters()).float()
        all_reduce(finite, op='min')  # with FSDP, each process checks its own shard
        if not finite:
            self.stop_for_weights(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # a run by iterations may save between two log lines
        good = self.state is None or is_good(self.state)
        if not good or not all_finite(v for v in checkpoint['state_dict'].values() if v.is_floating_point()):
            self.stop_for_weights(runner)

    def stop_for_weights(self, runner: Runner) -> None:
        self.stop(runner, f'The weights are not finite after iteration {runner.iter} (epoch {runner.epoch + 1})')

    def stop(self, runner: Runner, fault: str) -> None:
        checkpoint = find_latest_checkpoint(runner.work_dir)
        remedy = f'resume from {checkpoint}' if checkpoint else 'start again (no checkpoint was written yet)'
        raise InputError(f'{fault}; {remedy} with a lower learning rate or with optim_wrapper.clip_grad.')


def all_finite(weights: Iterable[Tensor]) -> Tensor:
    """Whether all numbers are finite, bool []; of sharded weights (DTensor), those of this process's shards."""
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return torch.stack([weight.isfinite().all() for weight in local]).all()


def is_good(state: Tensor) -> Tensor:
    """Whether loss and gradients of a step are finite, bool []; the state is [step, loss, gradients]."""
    return state[1].isfinite() & (state[2] > 0)
