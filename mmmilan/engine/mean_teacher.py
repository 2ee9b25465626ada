"""Update the mean teachers of a model."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmmilan.errors import InputError
from mmmilan.models.wrapping import MeanTeacher
from mmmilan.registry import HOOKS


@HOOKS.register_module()
class MeanTeacherHook(Hook):
    """Update every :class:`MeanTeacher` of the model after each step of the optimizer.

    The momentum rises linearly (a default of this project) from the first iteration to the last.

    Args:
        start: Momentum after the first iteration, 0 <= start < 1.
        end: Momentum after the last iteration.
    """

    def __init__(self, start: float = 0.999, end: float = 0.9999) -> None:
        if not 0 <= start <= end <= 1:
            raise InputError(f'MeanTeacherHook: start={start}, end={end}; choose 0 <= start <= end <= 1.')
        self.start = start
        self.end = end

    def momentum(self, iteration: int, max_iters: int) -> float:
        """Momentum after ``iteration``, counted from 0."""
        return self.start + (self.end - self.start) * iteration / max(1, max_iters - 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not runner.optim_wrapper.should_update():  # gradients were only accumulated
            return
        momentum = self.momentum(runner.iter, runner.max_iters)
        for module in runner.model.modules():
            if isinstance(module, MeanTeacher):
                module.update(momentum)
