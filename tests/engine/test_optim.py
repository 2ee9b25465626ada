"""Few groups of parameters and a sharded optimizer train as MMEngine's do; bfloat16 comes close."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from helpers import ROOT, build_model, masked_batch
from mmmilan.engine import BFloat16OptimWrapper
from mmmilan.errors import InputError
from mmmilan.models import MILAN
from mmmilan.registry import MODELS


def test_groups_of_parameters(milan_cfg):
    """Weights, norms and biases, tokens; after three fused steps the same weights as from MMEngine's many groups."""
    cfg = Config.fromfile(ROOT / 'configs/_base_/pretrain_adamw_coslr_400e.py').optim_wrapper
    cfg.type = 'OptimWrapper'
    plain = cfg.copy()
    plain.pop('constructor')
    plain.optimizer = {key: value for key, value in cfg.optimizer.items() if key != 'fused'}
    assert cfg.optimizer.fused
    weights, sizes = [], []
    for each in (cfg, plain):
        torch.manual_seed(0)
        model = MODELS.build(milan_cfg)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        wrapper = build_optim_wrapper(model, each)
        sizes.append(len(wrapper.optimizer.param_groups))
        for _ in range(3):
            wrapper.update_params(sum(p.square().sum() * (1 + i) for i, p in enumerate(model.parameters())))
        weights.append(model.state_dict())
    assert sizes[0] == 3 and sizes[1] > 50
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-5, atol=1e-6)


# -- bfloat16


def train(cfg: dict, wrapper: type[OptimWrapper], steps: int) -> tuple[list[float], MILAN]:
    """Losses of ``steps`` steps on one batch, and the trained model."""
    model = build_model(cfg)
    wrapper = wrapper(torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95)))
    images, samples = masked_batch(16)
    data = dict(inputs=images, data_samples=samples)
    return [model.train_step(data, wrapper)['loss'].item() for _ in range(steps)], model


def test_bfloat16_trains_and_stays_close_to_float32(milan_cfg, bfloat16):
    """Over 25 steps; in the next 15 any difference grows tenfold, also that of float32 from weights 0.1 % apart."""
    expected, _ = train(milan_cfg, OptimWrapper, steps=40)
    losses, model = train(milan_cfg, BFloat16OptimWrapper, steps=40)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses != expected  # the precision has an effect
    assert losses[-1] < 0.5 * losses[0]
    assert max(abs(a - b) / b for a, b in zip(losses[:25], expected[:25], strict=True)) < 0.002


def test_student_and_teacher_compute_in_bfloat16(milan_cfg, bfloat16):
    model = build_model(milan_cfg)
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    seen = {}
    for name in ('backbone.layers.0.attn.qkv', 'neck.decoder_blocks.0.attn.kv'):
        model.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.dtype}))
    teacher = model.head.teacher.visual.transformer.resblocks[0].mlp.c_fc
    teacher.register_forward_hook(lambda module, args, output: seen.update(teacher=output.dtype))
    images, samples = masked_batch(2)
    with wrapper.optim_context(model):
        loss = model.loss(images, samples)['loss']
    assert len(seen) == 3 and set(seen.values()) == {torch.bfloat16}
    assert loss.dtype == torch.float32


def test_float32_where_bfloat16_is_emulated(milan_cfg, monkeypatch, log):
    monkeypatch.setattr('mmmilan.engine.optim.computes_in_bfloat16', lambda device: False)
    expected, _ = train(milan_cfg, OptimWrapper, steps=2)
    losses, _ = train(milan_cfg, BFloat16OptimWrapper, steps=2)
    assert losses == expected
    assert 'This processor has no bfloat16 arithmetic' in log.text


def test_a_gpu_that_emulates_bfloat16_is_refused(milan_cfg, monkeypatch):
    model = build_model(milan_cfg)
    monkeypatch.setattr('mmmilan.engine.optim.get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla V100-SXM2-32GB')
    emulated = dict(including_emulation=True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **kwargs: kwargs == emulated or not kwargs)
    with pytest.raises(InputError, match='Tesla V100-SXM2-32GB has no bfloat16 arithmetic; train in float16'):
        BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
