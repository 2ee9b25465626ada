"""Few groups of parameters and a sharded optimizer train as MMEngine's do; bfloat16 comes close; mean teachers."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmpretrain.engine.optimizers import LARS as MMPretrainLARS
from torch import nn

from helpers import ROOT, build_model, check_layer_decay, masked_batch, rest_slow, run_mean_teacher_hook
from mmmilan.engine import LARS, BFloat16OptimWrapper, MeanTeacherHook
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


@pytest.mark.slow
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


SETTINGS = [
    dict(momentum=0.9),
    dict(momentum=0.9, weight_decay=0.1, nesterov=True),
    dict(momentum=0.5, dampening=0.3, weight_decay=0.1),
    dict(weight_decay=0.1, eta=0.02),
]


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_same_steps(settings):
    weights = []
    for optimizer in (LARS, MMPretrainLARS):
        torch.manual_seed(0)
        weight, bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.zeros(5))  # whose norm is zero at first
        excluded, unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
        groups = [dict(params=[weight, bias, unused]), dict(params=[excluded], lars_exclude=True)]
        steps = optimizer(groups, lr=0.7, **settings)
        for _ in range(4):
            steps.zero_grad()
            (weight @ torch.randn(7) + bias).square().sum().backward()
            (excluded * torch.randn(3)).sum().backward()
            steps.step()
        weights.append([weight, bias, excluded, unused])
    for actual, expected in zip(*weights, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights[0][0], torch.zeros(5, 7))


# config, blocks, decay, learning rate and weight decay of the paper's appendix A.1
RECIPES = [
    ('milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py', 12, 0.65, 4e-4, 0.05),
    ('detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py', 12, 0.75, 2e-4, 0.1),
    ('detection/mask-rcnn_vit-large-p16_milan-pre_8xb2-amp-lsj-1x_coco.py', 24, 0.85, 2e-4, 0.1),
    ('segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py', 12, 0.9, 3e-5, 0.05),
    ('segmentation/upernet_vit-large-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py', 24, 0.9, 3e-5, 0.05),
]
CONSTRUCTOR = 'mmmilan.LayerDecayOptimWrapperConstructor'


@pytest.mark.parametrize('recipe', rest_slow(RECIPES, RECIPES[1], RECIPES[3]), ids=[recipe[0] for recipe in RECIPES])
def test_every_parameter(recipe):
    check_layer_decay(*recipe)


def test_every_parameter_of_a_classifier_with_our_constructor():
    check_layer_decay(*RECIPES[0], constructor=CONSTRUCTOR)


@pytest.mark.parametrize(('optimizer', 'weight_decay'), [('AdamW', 0.01), ('SGD', 0.0), ('Rprop', 0.0)])
def test_optimizer_without_weight_decay(optimizer, weight_decay, milan_cfg):
    """It keeps its own default, and the learning rates decay all the same."""
    model = MODELS.build(milan_cfg)
    optim_wrapper = dict(optimizer=dict(type=optimizer, lr=0.1), constructor=CONSTRUCTOR)
    optim_wrapper['paramwise_cfg'] = dict(layer_decay_rate=0.5)
    groups = build_optim_wrapper(model, optim_wrapper).optimizer.param_groups
    assert {round(group['lr'], 9) for group in groups} == {0.1, 0.05, 0.025, 0.0125}
    assert {group['weight_decay'] for group in groups} == {weight_decay}


def test_only_for_a_vit():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3), constructor=CONSTRUCTOR)
    with pytest.raises(InputError, match='needs a ViT as backbone of Module, not Linear'):
        build_optim_wrapper(model, optim_wrapper | dict(paramwise_cfg=dict(layer_decay_rate=0.5)))


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
