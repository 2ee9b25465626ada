"""The decoders: FLOPs, the paper's equation 2, and the options of the prompting decoder."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmmilan.errors import InputError
from mmmilan.models.decoders import PromptingAttention, PromptingDecoder
from mmmilan.models.targets import CLIPTarget
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


# -- attention to prompts only, prediction of a part of the masked patches


def prompts_only(**options: object) -> PromptingDecoder:
    sizes = dict(num_patches=16, embed_dim=24, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=4)
    decoder = MODELS.build(dict(type='mmmilan.PromptingDecoder', predict_feature_dim=6, **sizes, **options))
    decoder.init_weights()
    return decoder.double()


class FixedTeacher(nn.Module):
    """Stands for a teacher of which only the width matters."""

    feature_dim = 6


@torch.no_grad()
def test_without_self_attention_a_patch_does_not_see_the_others():
    latent, order = torch.randn(2, 5, 24, dtype=torch.float64), torch.randperm(16).expand(2, -1)
    for self_attention in (False, True):
        decoder = prompts_only(self_attention=self_attention)
        full = decoder(latent, order[:, :4], order[:, 4:])
        part = decoder(latent, order[:, :4], order[:, 7:9])
        assert torch.allclose(part[:, :5], full[:, :5])
        assert torch.allclose(part[:, 5:], full[:, 8:10]) is not self_attention


@torch.no_grad()
def test_attention_to_prompts_only_is_one_softmax_over_them():
    attention = PromptingAttention(12, 3, project_prompts=True, self_attention=False).double()
    x, prompts = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    expected, *_ = F.multi_head_attention_forward(
        *(t.transpose(0, 1) for t in (x, prompts, prompts)),
        12,
        3,
        torch.cat([attention.q.weight, attention.kv.weight]),
        torch.cat([attention.q.bias, attention.kv.bias]),
        None,
        None,
        False,
        0.0,
        attention.proj.weight,
        attention.proj.bias,
    )
    assert torch.allclose(attention(x, prompts), expected.transpose(0, 1), rtol=1e-10, atol=1e-12)


def test_loss_of_a_random_part_is_unbiased():
    """The mean of loss and gradients over all choices of 2 of 5 masked patches is that of all 5, exactly."""
    decoder = prompts_only(self_attention=False)
    head = CLIPTarget(FixedTeacher())
    order = torch.stack([torch.randperm(16)[:9] for _ in range(2)])
    visible, masked = order.split([4, 5], dim=1)
    latent = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 10, 6, dtype=torch.float64)

    def loss_and_gradients(chosen: list[int]) -> list[torch.Tensor]:
        pred = decoder(latent, visible, masked[:, chosen])
        wanted = target[:, [0, 1, 2, 3, 4, *(5 + i for i in chosen)]]
        loss = head.compare(pred, wanted, 4, 5)[1].mean()
        weights = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        return [loss, *torch.autograd.grad(loss, [latent, *weights])]

    draws = [loss_and_gradients(list(chosen)) for chosen in itertools.combinations(range(5), 2)]
    assert len({loss.item() for loss, *_ in draws}) == 10
    for *drawn, expected in zip(*draws, loss_and_gradients([0, 1, 2, 3, 4]), strict=True):
        assert torch.allclose(torch.stack(drawn).mean(0), expected, rtol=1e-5, atol=1e-7)  # losses are float32


def test_predicted_patches_are_drawn_evenly_and_only_in_training():
    decoder = prompts_only(self_attention=False, predict_ratio=1 / 3)
    masked = torch.arange(100, 112).expand(3000, -1)
    drawn = decoder.train().sample(masked)
    assert drawn.shape == (3000, 4) and all(len(set(row)) == 4 for row in drawn.tolist())
    counts = torch.bincount(drawn.flatten() - 100, minlength=12)
    assert (counts - 1000).abs().max() < 130  # five standard deviations of 26
    assert torch.equal(decoder.eval().sample(masked), masked)


def test_predicting_a_third_saves_computation():
    """FLOPs of a third of the 147 masked patches with attention to prompts only, from the sizes."""
    decoder = MODELS.build(dict(type='mmmilan.PromptingDecoder', self_attention=False, predict_ratio=1 / 3))
    order = torch.randperm(196)[None]
    masked = decoder.sample(order[:, 49:])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(torch.randn(1, 50, 768), order[:, :49], masked)
    queries, keys, width = 49, 50, 512
    block = (10 * queries + 2 * keys) * width**2 + 2 * queries * keys * width
    expected = 2 * (8 * block + 50 * 768 * width + 99 * width * 512)
    assert counter.get_total_flops() == expected < 0.4 * count_flops('PromptingDecoder')


def test_refused_options(log):
    for ratio in (0, 1.5):
        with pytest.raises(InputError, match=f'predict_ratio={ratio} is out of range; choose 0 < predict_ratio <= 1'):
            prompts_only(self_attention=False, predict_ratio=ratio)
    with pytest.raises(InputError, match='project_prompts=False without self_attention'):
        prompts_only(self_attention=False, project_prompts=False)
    assert 'biases' not in log.text
    prompts_only(predict_ratio=0.5)
    assert 'predict_ratio=0.5 with self_attention=True biases the loss' in log.text
