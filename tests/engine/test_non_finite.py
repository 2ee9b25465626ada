"""A loss that is not finite ends the run before bad weights are saved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import get_priority

from mmmilan.engine import NonFiniteLossHook
from mmmilan.errors import InputError


def test_bad_loss_between_two_lines_of_the_log(tiny_config, run_tool, tmp_path):
    """It is found at the next line, named with its step, and not saved."""
    explosion = dict(type='MultiStepLR', by_epoch=False, milestones=[8], gamma=1e40)
    changes = {'param_scheduler': [explosion], 'default_hooks.logger.interval': 50}
    changes['train_dataloader.num_workers'] = 0
    with pytest.raises(SystemExit, match=r'error: The loss is nan at iteration 10 \(epoch 2\); resume from .*epoch_1'):
        run_tool('train.py', tiny_config(changes))
    assert [path.name for path in (tmp_path / 'work').glob('*.pth')] == ['epoch_1.pth']


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_bad_gradients_do_not_reach_the_weights(value, tmp_path, monkeypatch):
    """They are zeros when the optimizer's step begins; on a CPU the run ends after this step, between two log lines."""
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer, hook = torch.optim.SGD(model.parameters(), lr=1.0), NonFiniteLossHook()
    runner = SimpleNamespace(optim_wrapper=OptimWrapper(optimizer), iter=0, epoch=0, work_dir=str(tmp_path))
    monkeypatch.setattr('mmmilan.engine.non_finite.log_is_due', lambda *args: False)
    hook.before_train(runner)
    before = model.weight.detach().clone()
    for iteration, (gradient, changes) in enumerate([([1.0, 1e30], True), ([1.0, value], False)]):
        runner.iter = iteration
        model.weight.grad = torch.tensor([gradient])
        optimizer.step()
        assert bool((model.weight != before).all()) == changes and model.weight.isfinite().all()
        before = model.weight.detach().clone()
        if changes:
            hook.after_train_iter(runner, 0, outputs=dict(loss=torch.tensor(0.5)))
    with pytest.raises(InputError, match=r'The gradients are not finite at iteration 2 \(epoch 1\); start again'):
        hook.after_train_iter(runner, 0, outputs=dict(loss=torch.tensor(0.5)))


def test_a_step_that_loss_scaling_skips_is_no_fault(monkeypatch):
    optimizer, hook = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), NonFiniteLossHook()
    hook.before_train(SimpleNamespace(optim_wrapper=SimpleNamespace(optimizer=optimizer, loss_scaler=None)))
    assert not optimizer._optimizer_step_pre_hooks


def test_bad_weights_are_not_saved_between_two_lines_of_the_log(tmp_path):
    runner = SimpleNamespace(iter=7, epoch=0, work_dir=str(tmp_path))
    hook = NonFiniteLossHook()
    hook.before_save_checkpoint(runner, dict(state_dict=dict(weight=torch.zeros(2), steps=torch.tensor(3))))
    with pytest.raises(InputError, match='The weights are not finite after iteration 7'):
        hook.before_save_checkpoint(runner, dict(state_dict=dict(weight=torch.tensor([0.0, torch.nan]))))


def test_weights_spoilt_by_the_last_step_of_an_epoch(tmp_path):
    """No loss has shown them yet, but they are not saved."""
    runner = SimpleNamespace(model=torch.nn.Linear(2, 2), iter=6, epoch=0, work_dir=str(tmp_path))
    hook = NonFiniteLossHook()
    hook.after_train_epoch(runner)
    runner.model.weight.data[0, 1] = torch.inf
    with pytest.raises(InputError) as error:
        hook.after_train_epoch(runner)
    assert str(error.value) == (
        'The weights are not finite after iteration 6 (epoch 1); start again (no checkpoint was written yet) '
        'with a lower learning rate or with optim_wrapper.clip_grad.'
    )
    assert get_priority(hook.priority) < get_priority(CheckpointHook.priority)  # a lower number comes first
