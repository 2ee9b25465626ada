"""Fit a schedule to the number of images, and warn of one that does not fit."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import LinearParamScheduler, _ParamScheduler
from mmengine.runner import Runner

from mmmilan.building import arch_sizes
from mmmilan.errors import InputError, count
from mmmilan.registry import HOOKS

RECIPE_RATE, RECIPE_BATCH, RECIPE_WIDTH = 2.4e-3, 4096, 768  # of the paper: 1.5e-4 x 4096 / 256, for a ViT-B
STEPS = 10_000  # length of a run, within these limits
EPOCHS = (20, 400)
WARMUP = 0.1  # of the steps, as in the paper
FEW_STEPS = 300
WIDTH_POWER = 4 / 3  # within half a point of the best rate at widths 96, 192 and 384 (docs/own_images.md)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: Passes over the images.
        steps_per_epoch: Whole batches in a pass.
        warmup: Steps of linear warm-up.
        lr: Peak learning rate.
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
        """MMEngine's config: linear warm-up, then cosine to 0, updated every step."""
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
    """The largest power of two, up to ``largest``, that gives eight batches an epoch; at most 8 below 64 images."""
    if num_images < 64:
        return min(num_images, 8)
    return min(largest, 2 ** int(math.log2(num_images / 8)))


def fit_schedule(num_images: int, batch_size: int, epochs: int | None, width: int = RECIPE_WIDTH) -> Schedule:
    """The schedule for some images.

    The learning rate scales with the square root of the batch size, the rule for adaptive optimizers
    (arXiv 2205.10287); the linear rule gives too small a rate for small batches. It falls with the encoder's width, as
    Adam's does where an update should change all widths alike (arXiv 2203.03466, with the first power), and is never
    above the paper's own.
    It is the same when training starts from pretrained weights: lower rates were not better where measured
    (docs/own_images.md).

    Args:
        num_images: Number of training images, at least one batch.
        batch_size: Images in a step.
        epochs: Passes over the images; None for about ``STEPS`` steps.
        width: The encoder's, D.
    """
    steps_per_epoch = max(1, num_images // batch_size)
    if epochs is None:
        epochs = min(max(math.ceil(STEPS / steps_per_epoch), EPOCHS[0]), EPOCHS[1])
    lr = RECIPE_RATE * min(1, math.sqrt(batch_size / RECIPE_BATCH) * (RECIPE_WIDTH / width) ** WIDTH_POWER)
    warmup = max(2, int(WARMUP * epochs * steps_per_epoch))  # MMEngine's warm-up of one step never ends
    return Schedule(epochs, steps_per_epoch, warmup, float(f'{lr:.2g}'))


def width_of(config: Config) -> int | None:
    """The width D of the ViT of a config; None if it has none."""
    arch = ((config.get('model') or {}).get('backbone') or {}).get('arch')
    with suppress(InputError):  # another encoder's
        return arch_sizes(arch or '')['embed_dims']
    return None


def own_schedule(config: Config) -> Schedule | None:
    """The schedule of ``mmmilan.pretrain`` that a config has; None if it has another one, or the user changed it.

    ``auto_scale_lr.base_batch_size`` says for how many images a step it was made.
    """
    epochs, schedules = (config.get('train_cfg') or {}).get('max_epochs'), config.get('param_scheduler')
    batch_size = (config.get('auto_scale_lr') or {}).get('base_batch_size') or 0
    steps = schedules[-1].get('end', 0) // epochs if epochs and isinstance(schedules, list) and schedules else 0
    width = width_of(config)
    if not steps or not batch_size or not width or config.auto_scale_lr.get('enable'):
        return None
    schedule = fit_schedule(steps * batch_size, batch_size, epochs, width)
    return schedule if list(map(dict, schedules)) == schedule.param_scheduler() else None


def use_schedule(config: Config, num_images: int, batch_size: int, before: Schedule) -> Schedule:
    """Fit schedule and rate of a config to other images, epochs or images a step; a rate that the user chose stays."""
    after = fit_schedule(num_images, batch_size, config.train_cfg.max_epochs, width_of(config))
    config.param_scheduler = after.param_scheduler()
    config.auto_scale_lr.base_batch_size = batch_size
    if config.optim_wrapper.optimizer.lr == before.lr:
        config.optim_wrapper.optimizer.lr = after.lr
    return after


@HOOKS.register_module()
class ScheduleCheckHook(Hook):
    """Warn before the first step if a run is too short to learn, mostly warm-up, or longer than its schedule."""

    def before_train(self, runner: Runner) -> None:
        steps = runner.max_iters
        if steps < FEW_STEPS:
            runner.logger.warning(
                f'The run has {count(steps, "step")}, too few to learn much; train for more epochs, on more images or '
                'with smaller batches.'
            )
        schedulers = runner.param_schedulers
        schedulers = (
            schedulers if isinstance(schedulers, list) else [s for each in (schedulers or {}).values() for s in each]
        )
        warmup = max((last_step(s, runner) for s in schedulers if isinstance(s, LinearParamScheduler)), default=0)
        end = max((last_step(s, runner) for s in schedulers), default=steps)
        if end < steps:
            runner.logger.warning(
                f'The learning rate stays as it is after step {end} of {steps}, where its schedule ends; lengthen '
                'param_scheduler or train for less.'
            )
        if steps > 1 and warmup > steps / 2:
            runner.logger.warning(
                f'{min(1, warmup / steps):.0%} of the {steps} steps are warm-up (param_scheduler); shorten the warm-up '
                'or train for longer.'
            )


def last_step(scheduler: _ParamScheduler, runner: Runner) -> int:
    """The step at which a schedule ends."""
    return scheduler.end * (len(runner.train_dataloader) if scheduler.by_epoch else 1)
