"""Test-time registers, against loops over neurons and tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import relative_error
from mmmilan.errors import InputError
from mmmilan.teachers import find_register_neurons

NEURONS = [(0, 5), (1, 3), (1, 250)]


def reference(blocks: list, tokens: Tensor) -> Tensor:
    """Pre-norm blocks [norm, attention, norm, fc1, act, fc2] on tokens with the register as the last one."""
    tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
    for index, (norm1, attend, norm2, fc1, act, fc2) in enumerate(blocks):
        tokens = tokens + attend(norm1(tokens))
        hidden = act(fc1(norm2(tokens))).clone()
        for block, neuron in NEURONS:
            if block == index:
                for image in hidden:
                    image[-1, neuron] = max(token[neuron] for token in image)
                    image[1:-1, neuron] = 0
        tokens = tokens + fc2(hidden)
    return tokens


@torch.no_grad()
def test_clip(clip, build):
    name, path = clip
    cfg = dict(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path)
    teacher, plain = build(**cfg, register_neurons=NEURONS), build(**cfg)
    visual = plain.visual

    def parts(block: torch.nn.Module) -> tuple:
        def attend(x: Tensor) -> Tensor:
            return block.attn(x, x, x, need_weights=False)[0]

        return (
            block.ln_1,
            attend,
            block.ln_2,
            block.mlp.c_fc,
            torch.nn.SiLU(inplace=False) if (isinstance(block.mlp.gelu, torch.nn.SiLU)) else block.mlp.gelu,
            block.mlp.c_proj,
        )

    images = torch.randn(2, 3, 56, 56)
    expected = reference([parts(block) for block in visual.transformer.resblocks], visual._embeds(images))
    features, importance = teacher(images)
    assert features.shape == (2, 17, 24) and importance.shape == (2, 16)
    assert relative_error(features, visual.ln_post(expected[:, :-1]) @ visual.proj) < 1e-5
    assert relative_error(features, plain(images)[0]) > 1e-3  # registers have an effect


@torch.no_grad()
def test_timm(vit, build):
    """A ViT-Ti of 12 blocks: features and importance."""
    vit, path = vit
    cfg = dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=64)
    teacher = build(**cfg, register_neurons=NEURONS)
    blocks = [(b.norm1, b.attn, b.norm2, b.mlp.fc1, b.mlp.act, b.mlp.fc2) for b in vit.blocks]
    images = torch.randn(2, 3, 64, 64)
    embedded = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    expected = reference(blocks, embedded)
    features, importance = teacher(images)
    assert relative_error(features, vit.norm(expected[:, :-1])) < 1e-5
    last = reference(blocks[:-1], embedded)
    attn = vit.blocks[-1].attn
    query, key, _ = attn.qkv(vit.blocks[-1].norm1(last)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attention = (query @ key.transpose(2, 3) * attn.scale).softmax(-1).mean(1)
    assert relative_error(importance, attention[:, 0, 1:-1]) < 1e-5
    assert relative_error(teacher.forward_layers(images, [10])[0][0], last[:, :-1]) < 1e-5


@torch.no_grad()
def test_neurons_are_found(vit, build):
    """Two neurons of block 3 fire on bright patches and write long vectors, so that these patches are outliers."""
    vit, path = vit
    mlp = vit.blocks[3].mlp
    images = 0.1 * torch.randn(8, 3, 64, 64)
    images[:, :, 16:32, 32:48] += 3  # patch (1, 2), in four images
    images[4:, :, 16:32, 32:48] -= 3
    inputs = []
    vit.blocks[3].norm2.register_forward_hook(lambda module, args, output: inputs.append(output))
    vit(images)
    bright = inputs[0][:4, 1 + 6].mean(0) - inputs[0][4:, 1:].mean((0, 1))
    mlp.fc1.weight[[7, 100]] = 3 * bright / bright.norm()
    mlp.fc2.weight[:, [7, 100]] = 100 * torch.randn(192, 2)
    torch.save(vit.state_dict(), path)
    teacher = build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=64)
    norms = teacher.forward_layers(images, [-1])[0][0][:4, 1:].norm(dim=-1)
    threshold = float(norms.flatten().topk(5).values[3:].mean())  # the four bright patches are longer
    assert norms.argmax(1).tolist() == [6] * 4
    assert sorted(find_register_neurons(teacher, images[:4], threshold, top_block=5, number=2)) == [(3, 7), (3, 100)]
    with pytest.raises(InputError, match=r'No patch has a norm over 1000000000.0, the largest is .*; lower norm_thr'):
        find_register_neurons(teacher, images, 1e9, top_block=5, number=2)
    calm = build(
        type='mmmilan.TimmTeacher',
        model='vit_tiny_patch16_224',
        pretrained=path,
        input_size=64,
        register_neurons=[(3, 7), (3, 100)],
    )
    assert calm.forward_layers(images, [-1])[0][0][:4, 1:].norm(dim=-1).max() < threshold


def test_refused_blocks_and_models(vit, build):
    _, path = vit
    cfg = dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=64)
    with pytest.raises(InputError, match='register_neurons names block 12; choose from 0 to 11'):
        build(**cfg, register_neurons=[(12, 0)])
    with pytest.raises(InputError, match='no place for a test-time register'):
        build(type='mmmilan.TimmTeacher', model='eva02_tiny_patch14_224', pretrained=None, register_neurons=[(0, 0)])
