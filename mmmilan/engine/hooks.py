"""Hooks that make a run reproducible and report its faults."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import all_gather, all_reduce, broadcast_object_list, get_rank, master_only
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmmilan.checkpoints.loading import load_weights
from mmmilan.engine.resuming import check_resumable
from mmmilan.engine.throughput import log_is_due
from mmmilan.errors import InputError
from mmmilan.models.vit import MILANViT
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Seed every training step with (seed, rank, iteration).

    The random numbers of a step (mask, stochastic depth, mixup) then do not depend on earlier steps, and a run that was
    killed and resumed ends with the weights of an uninterrupted one.
    """

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        key = (runner.seed, get_rank(), runner.iter)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop all processes when a loss is not finite, before a checkpoint is saved.

    Losses stay on the GPU until a log line is due, so no step waits for them.

    Raises:
        InputError: naming the first bad step and the last good checkpoint.
    """

    priority = 'NORMAL'  # the checkpoint hook comes later, so the bad weights are never written

    def __init__(self) -> None:
        self.state: Tensor | None = None  # number and loss of the last step, or of the first bad one

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        loss = outputs['loss'].detach()
        state = torch.stack([torch.full_like(loss, runner.iter + 1), loss])
        self.state = state if self.state is None else torch.where(self.state[1].isfinite(), state, self.state)
        if log_is_due(runner, batch_idx):
            # one process with a bad loss spoils the weights of all
            bad = [state for state in torch.stack(all_gather(self.state)).tolist() if not math.isfinite(state[1])]
            if bad:
                iteration, loss = min(bad, key=lambda state: state[0])
                self.stop(runner, f'The loss is {loss} at iteration {int(iteration)} (epoch {runner.epoch + 1})')

    def after_train_epoch(self, runner: Runner) -> None:
        # the last step may have broken the weights, which only the next loss would show
        finite = all_finite(runner.model.parameters()).float()
        all_reduce(finite, op='min')  # with FSDP, each process checks its own shard
        if not finite:
            self.stop_for_weights(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # a run by iterations may save between two log lines
        if not all_finite(v for v in checkpoint['state_dict'].values() if v.is_floating_point()):
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


@HOOKS.register_module()
class CorruptImageHook(Hook):
    """Warn after each epoch of the images that did not decode so far, counted over all processes."""

    def after_train_epoch(self, runner: Runner) -> None:
        count = torch.tensor(getattr(runner.train_dataloader.dataset, 'num_corrupt', 0), device=get_device())
        all_reduce(count)
        if count:
            runner.logger.warning(f'{int(count)} images did not decode so far and were replaced by others.')


@HOOKS.register_module()
class ExactLoadingHook(Hook):
    """Load checkpoints of any layout at ``load_from`` and ``resume``; refuse one that lacks a weight of the model.

    MMEngine itself loads the weights that fit and leaves the others random.

    Raises:
        InputError: see :func:`mmmilan.checkpoints.loading.load_weights` and :func:`check_resumable`.
    """

    priority = 'VERY_LOW'  # after hooks that change the checkpoint, as EMAHook does

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        source = runner._load_from or f'The last checkpoint in {runner.work_dir}'
        if runner._resume:
            check_resumable(runner, checkpoint, source)
        # MMEngine loads the same weights once more
        checkpoint['state_dict'] = load_weights(unwrap(runner.model), checkpoint, source)


@HOOKS.register_module()
class ImageSizeHook(Hook):
    """Warn once if the size of the images is not the encoder's ``img_size``.

    A ViT accepts them, but interpolates its positions and often gives worse results. Detectors and segmentors, which
    take images of any size, are not checked.
    """

    def __init__(self) -> None:
        self.seen = False

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train') -> None:
        if self.seen:
            return
        self.seen = True
        backbone = getattr(unwrap(runner.model), 'backbone', None)
        images = data_batch.get('inputs') if isinstance(data_batch, dict) else None
        image = images[0] if isinstance(images, (list, tuple, Tensor)) and len(images) else None
        if not isinstance(backbone, MILANViT) or not isinstance(image, Tensor) or image.ndim != 3:
            return
        if tuple(image.shape[1:]) != tuple(backbone.img_size):
            runner.logger.warning(
                f'The images are {tuple(image.shape[1:])} but img_size={tuple(backbone.img_size)}: positions are '
                'interpolated; make the sizes in the pipeline and model.backbone.img_size equal unless that is meant.'
            )


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Refuse to train if data set and model have different numbers of classes.

    Raises:
        InputError: naming the options to set.
    """

    def before_train(self, runner: Runner) -> None:
        classes = getattr(runner.train_dataloader.dataset, 'metainfo', {}).get('classes')
        counts = {name: getattr(module, 'num_classes', None) for name, module in runner.model.named_modules()}
        wrong = [
            f'model.{name.removeprefix("module.")}.num_classes={count}'
            for name, count in counts.items()
            if classes and count not in (None, len(classes)) and not name.endswith('rpn_head')  # object or not
        ]
        if wrong:
            raise InputError(f'The training data has {len(classes)} classes, but {", ".join(wrong)}; make them equal.')


@HOOKS.register_module()
class MainLoggerHook(LoggerHook):
    """MMEngine's ``LoggerHook``, with a line every few seconds even if steps are slow.

    Only the main process writes the scores of a test; with MMEngine's hook all processes write the same file at once.

    Args:
        interval: Maximum number of steps between two lines.
        seconds: Maximum time between two lines, unless one step takes longer.
        kwargs: Other arguments of ``LoggerHook``.
    """

    def __init__(self, interval: int = 10, seconds: float = 10.0, **kwargs) -> None:
        super().__init__(interval=interval, **kwargs)
        self.max_interval = interval
        self.seconds = seconds

    after_test_epoch = master_only(LoggerHook.after_test_epoch)

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.last = runner.iter, time.monotonic()
        self.interval = 1  # until the duration of a step is known

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        due = log_is_due(runner, batch_idx)
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if due:  # only now, as all hooks must see the same interval
            step, now = runner.iter + 1, time.monotonic()
            pace = (now - self.last[1]) / max(1, step - self.last[0])
            interval = [max(1, min(self.max_interval, int(self.seconds / max(pace, 1e-6))))]
            broadcast_object_list(interval)  # hooks exchange losses when a line is due
            self.interval, self.last = interval[0], (step, now)
