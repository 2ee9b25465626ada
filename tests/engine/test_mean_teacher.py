"""The hook that moves mean teachers: its momentum, and the modules that it reaches."""

from __future__ import annotations

import pytest
import torch

from helpers import build_model, run_mean_teacher_hook
from mmmilan.engine import MeanTeacherHook
from mmmilan.errors import InputError


def test_momentum_rises_from_start_to_end():
    hook = MeanTeacherHook()
    assert [hook.momentum(i, 101) for i in (0, 50, 100)] == pytest.approx([0.999, 0.99945, 0.9999], abs=1e-12)
    assert hook.momentum(0, 1) == 0.999
    with pytest.raises(InputError, match='choose 0 <= start <= end <= 1'):
        MeanTeacherHook(start=0.9, end=0.5)


@pytest.mark.parametrize('iteration,momentum', [(0, 0.5), (99, 0.75)])
def test_hook_moves_every_mean_teacher(maskclip_cfg, iteration, momentum):
    model = build_model(maskclip_cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.add_(1)
    hook = MeanTeacherHook(start=0.5, end=0.75)
    run_mean_teacher_hook(hook, model, iteration, updated=False)  # gradients were only accumulated
    assert torch.equal(model.mean_teacher.module.cls_token, before['backbone.cls_token'])
    run_mean_teacher_hook(hook, model, iteration)
    for teacher, student in (('mean_teacher.module', 'backbone'), ('head.mean_tokenizer.module', 'head.tokenizer')):
        for name in (name for name in before if name.startswith(f'{student}.')):
            actual = model.state_dict()[name.replace(student, teacher, 1)]
            assert torch.allclose(actual, before[name] + 1 - momentum, atol=1e-6), name
