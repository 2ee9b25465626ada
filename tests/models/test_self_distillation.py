"""Soft assignments to codewords: their loss, center and temperature, and the use of the codewords."""

from __future__ import annotations

import math

import pytest
import torch

from mmmilan.models import CodewordTarget


@pytest.mark.parametrize('momentum', [0.9, None])
def test_center_and_temperature(momentum):
    """Against iBOT's two formulas over three batches; a batch in evaluation changes neither."""
    head = CodewordTarget(6, 10, teacher_temperature=0.07, first_teacher_temperature=0.04, warmup_steps=2)
    head.center_momentum = momentum
    batches = torch.randn(4, 2, 5, 6)
    center = torch.zeros(10)
    for i, temperature in enumerate((0.04, 0.055, 0.07, 0.07)):
        head.train(i < 3)
        logits = head.mean_tokenizer(batches[i])
        teacher = ((logits - center) / temperature).softmax(-1)
        student = (head.tokenizer(batches[i]) / 0.1).log_softmax(-1)
        torch.testing.assert_close(head.token_loss(batches[i], batches[i]), -(teacher * student).sum(-1))
        if momentum and i < 3:
            center = momentum * center + (1 - momentum) * logits.flatten(0, 1).mean(0)
        torch.testing.assert_close(head.center, center)
    assert head.steps == 3


def test_use_of_codewords():
    """Four tokens choose three codewords: two tokens choose the same one."""
    head = CodewordTarget(5, 5, teacher_temperature=0.01)
    with torch.no_grad():
        for value in (head.mean_tokenizer.module.weight, head.mean_tokenizer.module.bias):
            value.copy_(torch.eye(5) if value.ndim == 2 else torch.zeros(5))
    tokens = torch.eye(5)[torch.tensor([[0, 2], [2, 4]])]
    head.token_loss(tokens, tokens)
    assert head.statistics['codewords'] == 3
    expected = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5))
    assert head.statistics['codeword_entropy'].item() == pytest.approx(expected, rel=1e-5)
