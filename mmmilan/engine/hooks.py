"""Hooks that keep a run reproducible and its faults visible."""

from __future__ import annotations

import random

import numpy as np
import torch
from mmengine.dist import all_reduce, get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner, find_latest_checkpoint

from mmmilan.errors import InputError
from mmmilan.registry import HOOKS


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Seed every training step with (seed, rank, iteration).

    The random numbers of a step (the mask's draw, stochastic depth, mixup) then do not depend on the steps
    before it, and a run that was killed and resumed ends with the weights of an uninterrupted one.
    """

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        key = (runner.seed, get_rank(), runner.iter)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop at the first loss that is not finite, on all processes, before anything is saved.

    Raises:
        InputError: naming the step and the last good checkpoint.
    """

    priority = 'NORMAL'  # the checkpoint hook comes later, so the bad weights are never written

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        loss = outputs['loss'].detach().clone()
        all_reduce(loss, op='mean')  # one process with a bad loss spoils the weights of all
        if not torch.isfinite(loss):
            self.stop(runner, f'The loss is {loss.item()} at iteration {runner.iter + 1} (epoch {runner.epoch + 1})')

    def after_train_epoch(self, runner: Runner) -> None:
        # the last step may have spoilt the weights, which no loss has shown yet
        if not all(torch.isfinite(parameter).all() for parameter in runner.model.parameters()):
            self.stop(runner, f'The weights are not finite after iteration {runner.iter} (epoch {runner.epoch + 1})')

    def stop(self, runner: Runner, fault: str) -> None:
        checkpoint = find_latest_checkpoint(runner.work_dir)
        remedy = f'resume from {checkpoint}' if checkpoint else 'start again (no checkpoint was written yet)'
        raise InputError(f'{fault}; {remedy} with a lower learning rate or with optim_wrapper.clip_grad.')


@HOOKS.register_module()
class CorruptImageHook(Hook):
    """Say after each epoch how many images did not decode so far."""

    def after_train_epoch(self, runner: Runner) -> None:
        count = getattr(runner.train_dataloader.dataset, 'num_corrupt', 0)
        if count:
            runner.logger.warning(f'{count} images did not decode so far and were replaced by others.')
