"""The decoders: FLOPs, the paper's equation 2, and the options of the prompting decoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmmilan.errors import InputError
from mmmilan.models.decoders import PromptingAttention
from mmmilan.models.vit import gather_tokens
from mmmilan.registry import MODELS


def count_flops(decoder: str) -> int:
    """FLOPs of one image in the published sizes: 196 patches, 49 of them visible, 8 blocks of width 512."""
    decoder = MODELS.build(dict(type=f'mmmilan.{decoder}'))
    order = torch.randperm(196)[None]
    # the counter does not know the fused kernels of attention; the plain one is two matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(torch.randn(1, 50, 768), order[:, :49], order[:, 49:])
    return counter.get_total_flops()


def expected_flops(queries: int, keys: int) -> int:
    """FLOPs from the sizes; a multiplication with an addition counts as two."""
    width, tokens = 512, 197
    linear = 2 * queries + 2 * keys + 8 * queries  # in width²: query, output; key, value; feed-forward network
    block = linear * width**2 + 2 * queries * keys * width
    return 2 * (8 * block + 50 * 768 * width + tokens * width * 512)


@pytest.mark.slow
def test_prompting_saves_a_fifth_of_the_computation():
    """The paper says 20 % at 75 % masking (section 3.3)."""
    prompting, vanilla = count_flops('PromptingDecoder'), count_flops('MAEDecoder')
    assert vanilla == expected_flops(queries=197, keys=197)
    assert prompting == expected_flops(queries=147, keys=197)
    saved = 1 - prompting / vanilla
    assert 0.18 < saved < 0.24


def equation_2(attention: PromptingAttention, x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Equation 2 of the paper, one query and one head at a time: keys [z'; W_k x], values [z'; W_v x]."""
    width = x.shape[-1]
    size = width // attention.num_heads
    key_weight, value_weight = attention.kv.weight.split(width)
    key_bias, value_bias = attention.kv.bias.split(width)
    out = torch.zeros_like(x)
    for b in range(len(x)):
        keys = [*prompts[b], *(key_weight @ token + key_bias for token in x[b])]
        values = [*prompts[b], *(value_weight @ token + value_bias for token in x[b])]
        for i, token in enumerate(x[b]):
            query = attention.q.weight @ token + attention.q.bias
            for h in range(attention.num_heads):
                part = slice(h * size, (h + 1) * size)
                scores = [math.exp(query[part] @ key[part] / math.sqrt(size)) for key in keys]
                for score, value in zip(scores, values, strict=True):
                    out[b, i, part] += score / sum(scores) * value[part]
    return out @ attention.proj.weight.T + attention.proj.bias


@torch.no_grad()
def test_unprojected_prompts_are_equation_2():
    attention = PromptingAttention(12, 3, project_prompts=False).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    prompts = torch.randn(2, 4, 12, dtype=torch.float64)
    expected = equation_2(attention, x, prompts)
    assert torch.allclose(attention(x, prompts), expected, rtol=1e-10, atol=1e-12)
    attention.project_prompts = True  # the published code computes another function
    assert (attention(x, prompts) - expected).norm() > 0.1 * expected.norm()


@torch.no_grad()
def test_decoder_with_unprojected_prompts():
    sizes = dict(num_patches=9, embed_dim=10, decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2)
    decoder = MODELS.build(dict(type='mmmilan.PromptingDecoder', project_prompts=False, **sizes)).double()
    latent, order = torch.randn(2, 4, 10, dtype=torch.float64), torch.randperm(9).expand(2, -1)
    prompts, x = decoder.embed(latent, order[:, :3], order[:, 3:])
    for block in decoder.decoder_blocks:
        x = x + equation_2(block.attn, block.ln1(x), prompts)
        x = x + block.ffn.layers(block.ln2(x))
    expected = decoder.decoder_pred(decoder.ln1(torch.cat([prompts, x], dim=1)))
    assert torch.allclose(decoder(latent, order[:, :3], order[:, 3:]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('decoder', ['PromptingDecoder', 'MAEDecoder'])
@torch.no_grad()
def test_order_of_patches_does_not_matter(decoder):
    """Predictions follow the indices: a decoder does not restore the order of patches."""
    decoder = MODELS.build(dict(type=f'mmmilan.{decoder}', num_patches=16, embed_dim=24, decoder_num_heads=4))
    decoder.init_weights()
    latent, order = torch.randn(2, 5, 24), torch.stack([torch.randperm(16) for _ in range(2)])
    pred = decoder(latent, order[:, :4], order[:, 4:])
    shuffled = torch.cat([torch.randperm(4), 4 + torch.randperm(12)])
    visible = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + shuffled[:4]])
    again = decoder(latent[:, visible], order[:, shuffled[:4]], order[:, shuffled[4:]])
    assert torch.allclose(again[:, 0], pred[:, 0], atol=1e-5)
    assert torch.allclose(again[:, 1:], pred[:, 1:][:, shuffled], atol=1e-5)
    assert (again[:, 1:] - pred[:, 1:]).abs().max() > 0.01


@torch.no_grad()
def test_prompts_are_not_updated():
    """Predictions for visible patches are norm and projection of the prompts themselves."""
    decoder = MODELS.build(dict(type='mmmilan.PromptingDecoder', num_patches=16, embed_dim=24, decoder_num_heads=4))
    decoder.init_weights()
    latent, order = torch.randn(2, 5, 24), torch.randperm(16).expand(2, -1)
    pred = decoder(latent, order[:, :4], order[:, 4:])
    prompts = decoder.decoder_embed(latent)
    positions = decoder.decoder_pos_embed
    prompts[:, 0] += positions[:, 0]
    prompts[:, 1:] += gather_tokens(positions[:, 1:], order[:, :4])
    assert torch.allclose(pred[:, :5], decoder.decoder_pred(decoder.ln1(prompts)), atol=1e-6)


def test_patches_that_are_no_square():
    with pytest.raises(InputError, match='num_patches=195 is not a square number'):
        MODELS.build(dict(type='mmmilan.PromptingDecoder', num_patches=195))


@pytest.mark.parametrize('kind', ['PromptingDecoder', 'MAEDecoder'])
@pytest.mark.parametrize(('width', 'heads'), [(32, 5), (32, 0), (32, -2), (30, 2)])
def test_widths_that_do_not_divide(kind, width, heads):
    with pytest.raises(InputError, match='decoder_embed_dim'):
        MODELS.build(dict(type=f'mmmilan.{kind}', decoder_embed_dim=width, decoder_num_heads=heads)).init_weights()
