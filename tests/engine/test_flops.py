"""Counted FLOPs are those of closed formulas; peak FLOP/s of devices."""

from __future__ import annotations

import torch

from mmmilan.engine.throughput import counted_flops, peak_tflops
from mmmilan.registry import MODELS


def block_flops(tokens: int, width: int, hidden: int) -> int:
    """A transformer block: 4 projections, 2 products of attention, 2 layers of the FFN."""
    return 2 * tokens * (4 * width**2 + 2 * width * hidden) + 4 * tokens**2 * width


def counted(function, *args: object) -> int:
    with counted_flops() as counter:
        function(*args)
    return counter.get_total_flops()


def test_flops_of_the_encoder(milan_cfg):
    model = MODELS.build(milan_cfg)
    images, visible = torch.randn(2, 3, 64, 64), torch.arange(4).expand(2, -1)
    embedding = 2 * 4 * (3 * 16**2) * 48  # of the visible patches alone
    assert counted(model.backbone, images, visible) == 2 * (embedding + 2 * block_flops(5, 48, 192))
    backbone = MODELS.build(milan_cfg['backbone'])

    def forward_and_backward() -> None:
        backbone(images, visible).sum().backward()

    # the backward pass has two products for each, but one for the embedding, as images have no gradient; attention
    # computes its scores again: 5 products for 2
    expected = embedding * 2 + 2 * (3 * block_flops(5, 48, 192) + 2 * 5**2 * 48)
    assert counted(forward_and_backward) == 2 * expected


def test_flops_of_the_decoder(milan_cfg):
    model = MODELS.build(milan_cfg)
    order = torch.arange(16).expand(2, -1)
    width, hidden, prompts, masked = 32, 128, 5, 12
    block = 2 * masked * (2 * width**2 + 2 * width * hidden)  # queries, output projection, FFN
    block += 2 * (prompts + masked) * 2 * width**2  # keys and values
    block += 4 * masked * (prompts + masked) * width
    expected = 2 * prompts * 48 * width + 2 * block + 2 * (prompts + masked) * width * 24
    assert counted(model.neck, torch.randn(2, 5, 48), order[:, :4], order[:, 4:]) == 2 * expected


def test_flops_of_the_teacher(milan_cfg):
    teacher = MODELS.build(milan_cfg).head.teacher
    width, tokens = teacher.visual.conv1.out_channels, 17
    blocks = len(teacher.visual.transformer.resblocks)
    embedding = 2 * 16 * (3 * 16**2) * width
    # one row of attention: the class token's query, carried through the keys' weights, against all tokens
    heads = teacher.visual.transformer.resblocks[0].attn.num_heads
    importance = 2 * width**2 + 2 * width**2 + 2 * heads * tokens * width
    expected = embedding + blocks * block_flops(tokens, width, 4 * width) + 2 * tokens * width * 24 + importance
    assert counted(teacher, torch.randn(2, 3, 64, 64)) == 2 * expected


def test_peak_of_known_devices(monkeypatch):
    names = {
        'NVIDIA A100-SXM4-80GB': 312,
        'NVIDIA H100 PCIe': 756.5,
        'NVIDIA H100 80GB HBM3': 989.4,
        'NVIDIA H200 NVL': 835.5,
        'NVIDIA L4': 121,
        'NVIDIA L40': 181,
        'NVIDIA A40': 149.7,
        'NVIDIA GeForce RTX 5090': 209.5,
        'NVIDIA RTX A4000': None,
        'NVIDIA GeForce RTX 4090 Laptop GPU': None,
        'NVIDIA A100-SXM4-40GB MIG 3g.20gb': None,
        'Voodoo 2': None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert peak_tflops(torch.device('cuda'), torch.bfloat16) == peak, name
    assert peak_tflops(torch.device('cpu'), torch.bfloat16) is None
