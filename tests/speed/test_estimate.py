"""Estimates for a GPU agree with what is known without one."""

from __future__ import annotations

import argparse

import pytest
import torch
from contestants import milan_models, random_images, training_step
from estimate import PRODUCTS, Step, fuse, milliseconds, steps_of
from mmengine.optim import OptimWrapper
from timing import no_lap
from torch import nn

from fake_cuda import CUDA, Operation, Watch, fake_cuda
from mmmilan.engine.throughput import counted_flops

GB = 10**9


def operation(name: str, reads: dict[int, int], writes: dict[int, int], flops: int = 0) -> Operation:
    return Operation(name, reads, writes, flops, torch.bfloat16)


def test_roofline():
    """A product takes as long as its operations, an addition as long as its memory, a small one as long as a kernel."""
    product = operation('mm', {1: 1000}, {2: 1000}, flops=312 * 10**12)
    assert milliseconds([product], 'A100') == pytest.approx(1000 / PRODUCTS)
    assert milliseconds([operation('add', {1: GB}, {2: GB})], 'A100') == pytest.approx(1e3 * 2 / (0.8 * 2040))
    assert milliseconds([operation('add', {1: 1}, {2: 1})], 'A100') == pytest.approx(2e-3)
    step = Step(batch_size=4, peak=0, operations=[product])
    assert step.mfu('A100') == pytest.approx(PRODUCTS)


def test_what_is_fused():
    """All operations between two products become one kernel, whose intermediate results never go to memory."""
    chain = [
        operation('mm', {1: GB}, {2: GB}),
        operation('add', {2: GB}, {3: GB}),
        operation('gelu', {3: GB}, {4: GB}),
        operation('mm', {4: GB}, {5: GB}),
    ]
    fused = fuse(chain)
    assert [each.name for each in fused] == ['mm', 'fused', 'mm']
    assert (fused[1].reads, fused[1].writes) == ({2: GB}, {4: GB})


def test_peak_memory():
    """Memory of weights and activations, at its peak and after, to the byte."""
    with fake_cuda():
        weight = nn.Parameter(torch.empty(512, 512, device=CUDA))
        watch = Watch()
        watch.hold([weight])
        with watch:
            hidden = torch.empty(1024, 512, device=CUDA) @ weight  # 2 MiB each
            result = hidden.exp()
            del hidden
        assert watch.peak == 2**20 + 3 * 2**21 and watch.allocated == 2**20 + 2 * 2**21
        del result  # and with it what exp keeps for its gradient
        assert watch.allocated == 2**20


@pytest.mark.slow
def test_step():
    """The same operations as a real step on a CPU; less memory and time than mmpretrain's MILAN."""
    steps = dict(steps_of('step', arch='tiny', batch_size=2))
    settings = dict(arch='tiny', img_size=224, patch_size=16, device='cpu', compile=False, batch_size=2)
    args = argparse.Namespace(**settings)
    for name, step in steps.items():
        model, _ = milan_models(args, ours=name == 'mmmilan')
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with counted_flops() as counter:
            training_step(model, OptimWrapper(optimizer), random_images(args), None, no_lap)
        assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    ours, theirs = steps['mmmilan'], steps['mmpretrain']
    assert ours.peak < theirs.peak and ours.milliseconds('H100') < theirs.milliseconds('H100')
    assert ours.milliseconds('H100', compiled=True) < ours.milliseconds('H100')


@pytest.mark.slow
def test_the_tool(run_tool, capsys):
    run_tool('speed/estimate.py', 'segmentation', '--arch', 'tiny', '--device', 'L4')
    output = capsys.readouterr().out
    assert 'Computed, not measured' in output and 'L4: 121 TFLOP/s' in output
    assert 'Assumed: matrix products reach 70%' in output
    with pytest.raises(SystemExit, match=r'error: The config no\.py does not exist; correct its path'):
        run_tool('speed/estimate.py', 'no.py')
