"""The mean teacher: its average, and its place in a model."""

from __future__ import annotations

import torch

from helpers import build_model, captioned_batch, sum_losses
from mmmilan.models import MeanTeacher


def test_mean_teacher_follows_its_formula():
    """Against the average in double precision, with a momentum that changes at each step."""
    student = torch.nn.Linear(5, 7)
    teacher = MeanTeacher(student)
    expected = student.weight.detach().double().clone()
    for step in range(50):
        student.weight.data.normal_()
        momentum = 0.9 + 0.0019 * step
        teacher.update(momentum)
        expected = momentum * expected + (1 - momentum) * student.weight.detach().double()
        assert torch.allclose(teacher.module.weight.double(), expected, rtol=0, atol=1e-6)


def test_mean_teacher_is_saved_but_has_no_parameters(maskclip_cfg):
    model = build_model(maskclip_cfg)
    own = {name for name in model.state_dict() if name.startswith(('mean_teacher.', 'head.mean_tokenizer.'))}
    assert own == {f'mean_teacher.module.{name}' for name in model.backbone.state_dict()} | {
        f'head.mean_tokenizer.module.{name}' for name in ('weight', 'bias')
    }
    assert not own & {name for name, _ in model.named_parameters()}
    model.train()
    assert not any(module.training for module in model.mean_teacher.modules())
    for name, weight in model.backbone.state_dict().items():  # it starts as its student
        assert torch.equal(model.state_dict()[f'mean_teacher.module.{name}'], weight), name


def test_mean_teacher_gets_no_gradient(maskclip_cfg):
    model = build_model(maskclip_cfg)
    model.requires_grad_(True)
    images, samples = captioned_batch(3)
    assert not model.encode_tokens(model.mean_teacher, images).requires_grad
    sum_losses(model.loss(images, samples)).backward()
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in model.mean_teacher.buffers())
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {'backbone.cls_token', 'neck.mask_token', 'head.tokenizer.weight', 'language.mask_token'} <= trained
