"""A schedule for as many images as there are, and a warning where one does not fit them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmengine.hooks import Hook
from mmengine.optim import LinearParamScheduler
from mmengine.runner import Runner

from mmmilan.registry import HOOKS

RECIPE_RATE, RECIPE_BATCH = 2.4e-3, 4096  # of the paper: 1.5e-4 x 4096 / 256
STEPS = 10_000  # what a run gets, if that takes neither fewer nor more epochs than these
EPOCHS = (20, 400)
WARMUP = 0.1  # of the steps, as in the paper
FEW_STEPS = 300


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: Passes over the images.
        steps_per_epoch: Whole batches in a pass.
        warmup: Steps of growing learning rate.
        lr: The greatest learning rate.
    """

    epochs: int
    steps_per_epoch: int
    warmup: int
    lr: float

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.epochs * self.steps_per_epoch

    def param_scheduler(self) -> list[dict]:
        """MMEngine's config: linear warm-up, then a cosine to 0, step by step."""
        return [
            dict(type='LinearLR', start_factor=1e-4, by_epoch=False, begin=0, end=self.warmup),
            dict(
                type='CosineAnnealingLR',
                by_epoch=False,
                T_max=max(1, self.steps - self.warmup),
                begin=self.warmup,
                end=max(self.steps, self.warmup + 1),
            ),
        ]


def fit_batch_size(num_images: int, largest: int) -> int:
    """The largest power of two that makes eight batches of the images, or ``largest``; all images if they are few."""
    if num_images < 64:
        return min(num_images, 8)
    return min(largest, 2 ** int(math.log2(num_images / 8)))


def fit_schedule(num_images: int, batch_size: int, epochs: int | None) -> Schedule:
    """The schedule for some images.

    The learning rate follows the square root of the batch, which is the rule for Adam and its kin (arXiv 2205.10287):
    the linear rule would leave a small batch with next to none. It is the same from weights that know images already:
    gentler rates did no better where it was measured (docs/own_images.md).

    Args:
        num_images: Number of training images, at least a batch.
        batch_size: Images in a step.
        epochs: Passes over the images; None for about ``STEPS`` steps.
    """
    steps_per_epoch = num_images // batch_size
    if epochs is None:
        epochs = min(max(math.ceil(STEPS / steps_per_epoch), EPOCHS[0]), EPOCHS[1])
    lr = RECIPE_RATE * math.sqrt(batch_size / RECIPE_BATCH)
    warmup = max(2, int(WARMUP * epochs * steps_per_epoch))  # MMEngine's warm-up of one step never ends
    return Schedule(epochs, steps_per_epoch, warmup, float(f'{lr:.2g}'))


@HOOKS.register_module()
class ScheduleCheckHook(Hook):
    """Warn, before the first step, of a run that is too short to learn or that is mostly warm-up."""

    def before_train(self, runner: Runner) -> None:
        steps = runner.max_iters
        if steps < FEW_STEPS:
            runner.logger.warning(
                f'The run has {steps} steps, too few to learn much; train for more epochs, on more images or with '
                'smaller batches.'
            )
        schedulers = runner.param_schedulers
        schedulers = (
            schedulers if isinstance(schedulers, list) else [s for each in (schedulers or {}).values() for s in each]
        )
        warmup = max((warmup_steps(s, runner) for s in schedulers if isinstance(s, LinearParamScheduler)), default=0)
        if steps > 1 and warmup > steps / 2:
            runner.logger.warning(
                f'The learning rate is still growing in {min(1, warmup / steps):.0%} of the {steps} steps '
                '(param_scheduler); shorten the warm-up or train for longer.'
            )


def warmup_steps(scheduler: LinearParamScheduler, runner: Runner) -> int:
    """The step at which a warm-up ends."""
    return scheduler.end * (len(runner.train_dataloader) if scheduler.by_epoch else 1)
