"""Training steps on a fake CUDA device: ours run on it without a wait, and waits of others are noticed."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from fake_cuda import CUDA, Watch, backward, fake_cuda, to_fake, train_step
from helpers import ROOT, rest_slow
from mmmilan.engine import DeferredRuntimeInfoHook, MeanTeacherHook, NonFiniteLossHook, StepSeedHook
from mmmilan.registry import MODELS

ARCH = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192)


def read(config: str) -> Config:
    """A recipe with a tiny encoder for images of 64 pixels."""
    cfg = Config.fromfile(ROOT / 'configs' / config)
    cfg.model.backbone.update(arch=ARCH, img_size=64, init_cfg=None)
    return cfg


def batch(size: int = 4, **fields: Tensor | int) -> dict:
    """A batch of the data loader: images and data samples in the memory of the host."""
    samples = [DataSample() for _ in range(size)]
    for sample in samples:
        for name, value in fields.items():
            sample.set_gt_label(value) if name == 'gt_label' else sample.set_field(value, name)
    return dict(inputs=torch.zeros(size, 3, 64, 64, dtype=torch.uint8), data_samples=samples)


def run(model: nn.Module, optim_wrapper: dict, data: dict) -> Watch:
    """A training step with the hooks of every step."""
    with fake_cuda():
        to_fake(model).train()
        wrapper = build_optim_wrapper(model, optim_wrapper)
        runner = SimpleNamespace(
            model=model, optim_wrapper=wrapper, seed=0, iter=3, epoch=0, max_iters=100, train_dataloader=[None] * 100
        )
        runner.hooks, runner.message_hub = [LoggerHook(interval=50)], MessageHub('gpu-free')
        hooks = [StepSeedHook(), NonFiniteLossHook(), DeferredRuntimeInfoHook(), MeanTeacherHook()]
        images, watch = data['inputs'].clone(), Watch()
        with watch:
            for hook in hooks:
                hook.before_train_iter(runner, 3)
            log = train_step(model, wrapper, data | dict(inputs=watch.pin(images)))
            for hook in hooks:
                hook.after_train_iter(runner, 3, data, log)
        assert {each.device for each in (*model.parameters(), *model.buffers(), *log.values())} == {CUDA}
    return watch


def milan(milan_cfg: dict, **changes: dict) -> tuple[nn.Module, dict]:
    cfg = Config.fromfile(ROOT / 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py')
    return MODELS.build(milan_cfg | dict(data_preprocessor=cfg.model.data_preprocessor) | changes), cfg.optim_wrapper


def test_milan(milan_cfg):
    watch = run(*milan(milan_cfg), batch())
    assert not watch.waits
    names = {operation.name for operation in watch.operations}
    assert {'_scaled_dot_product_flash_attention_backward', '_fused_adamw_'} <= names
    assert sum(operation.name == '_fused_adamw_' for operation in watch.operations) == 3  # groups of parameters


@pytest.mark.slow
def test_teacher_in_float16(milan_cfg):
    """On a GPU its weights stay in float16."""
    milan_cfg['head']['teacher']['weight_dtype'] = 'float16'
    model, optim_wrapper = milan(milan_cfg)
    assert not run(model, optim_wrapper, batch()).waits
    assert {parameter.dtype for parameter in model.head.teacher.parameters()} == {torch.float16}


PARTS = ['pixels', 'mae decoder', 'distillation', 'random masking', 'checkpointing']


@pytest.mark.slow
@pytest.mark.parametrize('part', PARTS)
def test_other_parts(milan_cfg, part):
    if part == 'pixels':
        milan_cfg['neck']['predict_feature_dim'] = 768
        milan_cfg['head'] |= dict(type='mmmilan.PixelTarget', norm_pix=True)
    elif part == 'mae decoder':
        milan_cfg['neck']['type'] = 'mmmilan.MAEDecoder'
    elif part == 'distillation':
        milan_cfg['neck'] = dict(type='mmmilan.LinearProjection', embed_dim=48, predict_feature_dim=24)
    elif part == 'random masking':
        milan_cfg['masking'] = dict(type='mmmilan.RandomMasking', mask_ratio=0.75)
    else:
        milan_cfg['backbone']['with_cp'] = milan_cfg['neck']['with_cp'] = True
    assert not run(*milan(milan_cfg), batch()).waits


@pytest.mark.slow
def test_maskclip():
    cfg = read('maskclip/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py')
    cfg.model.text.update(context_length=12, vocab_size=60, width=32, heads=2, layers=2)
    cfg.model.neck.update(num_patches=16, embed_dim=48, predict_feature_dim=48, decoder_embed_dim=32)
    cfg.model.head.update(feature_dim=48, num_codewords=32)
    text = torch.tensor([58, 3, 4, 5, 6, 59, *[0] * 6])
    assert not run(MODELS.build(cfg.model), cfg.optim_wrapper, batch(text=text)).waits


@pytest.mark.parametrize('augment', rest_slow([0, 1], 1), ids=['Mixup', 'CutMix'])
def test_fine_tuning(augment):
    cfg = read('milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py')
    cfg.model.head.in_channels = 48
    cfg.model.train_cfg.augments = [cfg.model.train_cfg.augments[augment]]
    watch = run(MODELS.build(cfg.model), cfg.optim_wrapper, batch(gt_label=7))
    assert not watch.waits
    assert sum(operation.name == '_fused_adamw_' for operation in watch.operations) <= 2 * (2 + 2)


@pytest.mark.parametrize('semantic', rest_slow(['', 'semantic-aware-'], ''))
def test_probing(semantic, clip_file):
    cfg = read(f'milan/benchmarks/vit-base-p16_milan-pre_8xb2048-{semantic}linear-coslr-100e_in1k.py')
    cfg.model.backbone.frozen_stages = 2
    cfg.model.neck.input_features = cfg.model.head.in_channels = 48
    if semantic:
        cfg.model.backbone.teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    assert not run(MODELS.build(cfg.model), cfg.optim_wrapper, batch(gt_label=7)).waits


@pytest.mark.slow
@pytest.mark.parametrize('rel_pos_bias', [False, True])
def test_dense_encoder(rel_pos_bias):
    """Forward and backward pass; the heads of mmdet and mmseg, which do wait, are left out."""
    settings = dict(arch=ARCH | dict(num_layers=4), out_indices=(0, 1, 2, 3), window_size=3, global_indices=(1, 3))
    model = MODELS.build(dict(type='mmmilan.DenseViT', img_size=64, rel_pos_bias=rel_pos_bias, **settings))
    with fake_cuda():
        to_fake(model)
        images, watch = torch.zeros(2, 3, 80, 64, device=CUDA), Watch()
        with watch:
            with torch.autocast('cuda', torch.bfloat16):
                maps = model(images)
            losses = [sum(each.float().sum() for each in maps)]
            del maps
            backward(losses)
    assert not watch.waits
    assert all(parameter.grad is not None for parameter in model.parameters())


# -- waits are noticed


def waits_with(milan_cfg: dict, preprocessor: str) -> str:
    model, wrapper = milan(milan_cfg)
    return str(
        run(
            MODELS.build(milan_cfg | dict(data_preprocessor=dict(type=preprocessor, to_rgb=True))), wrapper, batch()
        ).waits
    )


def test_it_notices_a_list_of_indices(milan_cfg):
    assert 'mmpretrain/models/utils/data_preprocessor.py' in waits_with(milan_cfg, 'mmpretrain.SelfSupDataPreprocessor')


def test_it_notices_fetched_numbers():
    cfg = read('milan/benchmarks/vit-base-p16_milan-pre_8xb2048-linear-coslr-100e_in1k.py')
    cfg.model.backbone.frozen_stages = 2
    cfg.model.neck.input_features = cfg.model.head.in_channels = 48
    cfg.optim_wrapper.optimizer.type = 'mmpretrain.LARS'
    waits = run(MODELS.build(cfg.model), cfg.optim_wrapper, batch(gt_label=7)).waits
    # the norms of the weight and of its gradient
    assert sum(count for where, count in waits.items() if '_local_scalar_dense: mmpretrain/engine/opt' in where) == 2


def test_it_notices_permutations_and_labels_on_the_host():
    cfg = read('milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py')
    cfg.model.head.in_channels = 48
    cfg.model.data_preprocessor.type = 'mmpretrain.ClsDataPreprocessor'
    cfg.model.train_cfg.augments = [dict(type='Mixup', alpha=0.8)]
    waits = str(run(MODELS.build(cfg.model), cfg.optim_wrapper, batch(gt_label=7)).waits)
    assert 'batch_augments/mixup.py' in waits and 'mmpretrain/models/utils/data_preprocessor.py' in waits


@pytest.mark.parametrize(
    ('function', 'what'),
    [
        (lambda x: x[x > 0], 'index by a mask'),
        (lambda x: x.sum().item(), '_local_scalar_dense'),
        (lambda x: x.nonzero(), 'nonzero'),
        (lambda x: x.cpu(), 'copy to the host'),
        (lambda x: x + torch.ones(4).to(CUDA), 'copy to the device'),
        (lambda x: x + torch.ones(4).to(CUDA, non_blocking=True), 'copy to the device'),  # not pinned
        (lambda x: x if (x > 0).all() else -x, '_local_scalar_dense'),
    ],
)
def test_it_notices(function, what):
    with fake_cuda():
        x, watch = torch.randn(4, device=CUDA), Watch()
        with watch, suppress(RuntimeError):  # fake tensors have no numbers to answer with
            function(x)
    assert [where.partition(':')[0] for where in watch.waits] == [what]


def test_it_refuses_another_device():
    with fake_cuda(), pytest.raises(RuntimeError, match='device'):
        torch.ones(4, device=CUDA) + torch.ones(4)


def test_backward_pass(milan_cfg):
    """The backward pass in Python gives the gradients of PyTorch's own."""
    milan_cfg['neck']['with_cp'] = True
    torch.manual_seed(0)
    model = MODELS.build(milan_cfg)
    model.init_weights()
    torch.manual_seed(1)
    model.loss(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)))['loss'].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    calls: list[int] = []
    for block in model.neck.decoder_blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    losses = [model.loss(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)))['loss']]
    backward(losses)
    assert len(calls) == 2 * 2  # a checkpointed block runs once more, not twice more
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, value, rtol=1e-4, atol=1e-6)
