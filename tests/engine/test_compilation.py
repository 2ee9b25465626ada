"""Compilation and activation checkpointing change no result; compiled models are whole graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from mmpretrain.structures import DataSample
from torch import Tensor, nn

import mmmilan.engine.compilation as compilation
from helpers import assert_close, masked_batch
from mmmilan.engine import CompileHook
from mmmilan.engine.compilation import compile_model
from mmmilan.engine.throughput import counted_flops
from mmmilan.models import MILAN
from mmmilan.registry import MODELS


def compiled(cfg: dict, **options) -> MILAN:
    """The model of a config as a run with :class:`CompileHook` trains it."""
    model = MODELS.build(cfg)
    CompileHook(enabled=True, **options).before_train(SimpleNamespace(model=model))
    return model


class Step(NamedTuple):
    """What a training step computes, and what it takes."""

    model: MILAN
    loss: float
    gradients: dict[str, Tensor]
    kept: int  # bytes of activations that the forward pass keeps
    flops: int  # of matrix products in the backward pass


def step(cfg: dict, build: Callable[[dict], MILAN] = MODELS.build) -> Step:
    """A training step of a model with fixed weights, on fixed images and masks."""
    torch.manual_seed(0)
    model = build(cfg)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(*masked_batch(64))['loss']
    with counted_flops() as counter:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    flops = counter.get_flop_counts()['Global'][torch.ops.aten.mm]
    return Step(model, loss.item(), gradients, sum(kept.values()), flops)


def assert_same(actual: Step, expected: Step) -> None:
    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_close(actual.gradients, expected.gradients)


@pytest.mark.slow
def test_compiled_gives_the_same_and_keeps_less(milan_cfg):
    """All of ``torch.compile`` but the generation of code, which takes minutes here.

    The backward pass recomputes norms and GELUs, not matrix products.
    """
    milan_cfg['neck']['decoder_depth'] = 1
    expected = step(milan_cfg)
    actual = step(milan_cfg, partial(compiled, backend='aot_eager_decomp_partition'))
    assert_same(actual, expected)
    assert actual.model.state_dict().keys() == expected.model.state_dict().keys()
    assert actual.kept < 0.75 * expected.kept
    assert actual.flops == expected.flops


@pytest.fixture
def graphs():
    """A function that returns the number of graphs compiled so far and the reasons of graph breaks."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: (counters['stats']['unique_graphs'], list(counters['graph_break']))
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_loss_is_one_graph(milan_cfg, graphs):
    """No graph break and no recompilation; evaluation is not compiled."""
    model = compiled(milan_cfg, backend='eager')
    for _ in range(3):
        model.loss(torch.randn(4, 3, 64, 64), [DataSample() for _ in range(4)])['loss'].backward()
        assert graphs() == (2, [])  # the first is of the check for a compiler
    model.eval()
    model.loss(torch.randn(3, 3, 64, 64))
    assert graphs() == (2, [])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mmpretrain.VisionTransformer', 'mmmilan.DenseViT'])
def test_an_encoder_is_one_graph(name, graphs):
    """With stochastic depth, whose rates are NumPy's in mmpretrain."""
    arch = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)
    settings = dict(window_size=3, rel_pos_bias=True, out_indices=(0, 1, 2, 3)) if 'Dense' in name else {}
    encoder = MODELS.build(dict(type=name, arch=arch, img_size=64, drop_path_rate=0.1, **settings))
    model = nn.Module()
    model.backbone = encoder
    encoder.train()
    compile_model(model, backend='eager', fullgraph=True)
    for _ in range(3):
        sum(each.sum() for each in encoder(torch.randn(2, 3, 64, 64))).backward()
        assert graphs() == (1, [])


@pytest.mark.slow
def test_parts_of_maskclip_are_whole_graphs(graphs):
    """Image, text, distillation by the mean teacher and language: one graph each."""
    arch = dict(embed_dims=48, num_layers=1, num_heads=3, feedforward_channels=96)
    decoder = dict(num_patches=16, embed_dim=48, predict_feature_dim=48, decoder_embed_dim=32, decoder_num_heads=4)
    cfg = dict(
        type='mmmilan.MaskCLIP',
        backbone=dict(type='mmmilan.MILANViT', arch=arch, img_size=64, patch_size=16),
        text=dict(context_length=12, vocab_size=60, width=32, heads=2, layers=1),
        embed_dim=24,
        masking=dict(type='mmmilan.RandomMasking', mask_ratio=0.75),
        neck=dict(type='mmmilan.MAEDecoder', decoder_depth=1, **decoder),
        head=dict(type='mmmilan.CodewordTarget', feature_dim=48, num_codewords=32),
        language=dict(type='mmmilan.MaskedLanguageModel', mask_ratio=0.2, decoder_depth=1, decoder_num_heads=8),
    )
    model = MODELS.build(cfg)
    model.init_weights()
    compile_model(model, backend='eager')
    samples = [DataSample() for _ in range(4)]
    for sample in samples:
        sample.set_field(torch.tensor([58, 3, 4, 5, 6, 59, *[0] * 6]), 'text')
    for _ in range(3):
        losses = model.loss(torch.randn(4, 3, 64, 64), samples)
        sum(value for name, value in losses.items() if name.startswith('loss')).backward()
        assert graphs() == (4, [])


@pytest.mark.slow
def test_blocks_of_a_sharded_model_are_compiled(milan_cfg, monkeypatch, graphs):
    """FSDP runs hooks between them."""
    monkeypatch.setattr(compilation, 'DTensor', nn.Parameter)
    model = MODELS.build(milan_cfg)
    compile_model(model, backend='eager')
    for _ in range(2):
        model.loss(torch.randn(4, 3, 64, 64))['loss'].backward()
        assert graphs() == (2, [])  # of the blocks of the encoder, and of those of the decoder


def test_compiles_on_a_gpu_alone(milan_cfg):
    model = MODELS.build(milan_cfg)
    CompileHook().before_train(SimpleNamespace(model=model))
    assert 'mean_loss' not in vars(model)


@pytest.mark.parametrize('enabled', [True, False])
def test_start_of_a_step_is_marked(monkeypatch, enabled):
    """Or a CUDA graph would reuse the memory of outputs that are still needed; not without compilation."""
    calls = []
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: calls.append('begin'))
    hook = CompileHook(enabled, backend='eager')
    hook.before_train(SimpleNamespace(model=nn.Linear(2, 2)))
    hook.before_train_iter(None, 0)
    assert calls == ['begin'] * enabled


def test_no_compiler(milan_cfg, monkeypatch, log):
    """The run goes on uncompiled, with a warning."""

    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError('No working C++ compiler found\nand more')

    monkeypatch.setattr(compilation.torch, 'compile', missing)
    actual = step(milan_cfg, compiled)
    monkeypatch.undo()
    assert_same(actual, step(milan_cfg))
    assert 'The model runs uncompiled: No working C++ compiler found' in log.text


@pytest.mark.parametrize('decoder', ['PromptingDecoder', 'MAEDecoder'])
def test_activation_checkpointing_gives_the_same(milan_cfg, decoder):
    milan_cfg['neck']['type'] = f'mmmilan.{decoder}'
    expected = step(milan_cfg)
    milan_cfg['backbone']['with_cp'] = milan_cfg['neck']['with_cp'] = True
    blocks = counted_calls(milan_cfg)
    assert_same(step(milan_cfg), expected)
    assert blocks == 2 * 4  # two blocks each of encoder and decoder, forward and again in the backward pass


def counted_calls(cfg: dict) -> int:
    """How often blocks of encoder and decoder run in one step."""
    calls = []
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    for block in (*model.backbone.layers, *model.neck.decoder_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.loss(torch.randn(2, 3, 64, 64))['loss'].backward()
    return len(calls)
