"""Assignments to codewords: loss, center, temperature, use; masked language modelling: words, replacements, loss."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F

from helpers import START_TOKEN, encode_words
from mmmilan.models import CodewordTarget, MaskedLanguageModel
from mmmilan.models.maskclip_losses import is_padding, is_word


@pytest.mark.parametrize('momentum', [0.9, None])
def test_center_and_temperature(momentum):
    """Against iBOT's two formulas over three batches; a batch in evaluation changes neither."""
    head = CodewordTarget(6, 10, teacher_temperature=0.07, first_teacher_temperature=0.04, warmup_steps=2)
    head.center_momentum = momentum
    batches = torch.randn(4, 2, 5, 6)
    center = torch.zeros(10)
    for i, temperature in enumerate((0.04, 0.055, 0.07, 0.07)):
        head.train(i < 3)
        logits = head.mean_tokenizer(batches[i])
        teacher = ((logits - center) / temperature).softmax(-1)
        student = (head.tokenizer(batches[i]) / 0.1).log_softmax(-1)
        torch.testing.assert_close(head.token_loss(batches[i], batches[i]), -(teacher * student).sum(-1))
        if momentum and i < 3:
            center = momentum * center + (1 - momentum) * logits.flatten(0, 1).mean(0)
        torch.testing.assert_close(head.center, center)
    assert head.steps == 3


def test_use_of_codewords():
    """Four tokens choose three codewords: two tokens choose the same one."""
    head = CodewordTarget(5, 5, teacher_temperature=0.01)
    with torch.no_grad():
        for value in (head.mean_tokenizer.module.weight, head.mean_tokenizer.module.bias):
            value.copy_(torch.eye(5) if value.ndim == 2 else torch.zeros(5))
    tokens = torch.eye(5)[torch.tensor([[0, 2], [2, 4]])]
    head.token_loss(tokens, tokens)
    assert head.statistics['codewords'] == 3
    expected = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5))
    assert head.statistics['codeword_entropy'].item() == pytest.approx(expected, rel=1e-5)


def language_model(**kwargs) -> MaskedLanguageModel:
    model = MaskedLanguageModel(width=32, vocab_size=40, decoder_num_heads=4, **kwargs)
    model.init_weights()
    return model


def tower() -> torch.nn.Module:
    return open_clip.transformer.TextTransformer(12, 40, 32, heads=2, layers=2, output_dim=8)


def test_words_and_padding():
    text = encode_words([[5, 0, 7], [], [1] * 10])  # 0 is a word, and also the padding
    assert is_word(text).sum(1).tolist() == [3, 0, 10]
    assert is_word(text)[0, 1:4].all()
    assert is_padding(text).sum(1).tolist() == [7, 10, 0]
    assert not (is_word(text) & is_padding(text)).any()


def test_a_fifth_of_the_words_is_masked_and_nothing_else():
    text = encode_words([[3] * 10, [0, 1], [4] * 7, []]).repeat(500, 1)
    masked = language_model().draw(text)
    assert masked.sum(1).tolist() == [2, 1, 1, 0] * 500
    assert not (masked & ((text >= START_TOKEN) | is_padding(text))).any()
    share = masked.float().reshape(500, 4, 12).mean(0)
    assert torch.allclose(share[0, 1:11], torch.full((10,), 0.2), atol=0.06)  # each word is masked equally often


def test_masked_words_are_replaced_as_bert_does():
    text = encode_words([[3] * 10] * 2000)
    masked = is_word(text)
    corrupted, hidden = language_model().corrupt(text, masked)
    assert torch.equal(corrupted[~masked], text[~masked]) and not (hidden & ~masked).any()
    assert hidden[masked].float().mean().item() == pytest.approx(0.8, abs=0.01)
    random = corrupted[masked & ~hidden]
    assert (random != 3).float().mean().item() == pytest.approx(0.5 * 37 / 38, abs=0.02)
    assert random.max() == START_TOKEN - 1 and random.min() == 0  # words, never start or end


def test_language_loss_is_the_cross_entropy_of_masked_words():
    model, text_tower = language_model(), tower()
    text = encode_words([[3, 9, 1, 7, 2], [30, 31]])
    masked = torch.zeros_like(text, dtype=torch.bool)
    masked[0, 2] = masked[0, 5] = masked[1, 1] = True
    replaced = text.clone()
    replaced[0, 5] = 11
    hidden = masked.clone()
    hidden[0, 5] = False
    model.draw, model.corrupt = lambda text: masked, lambda text, masked: (replaced, hidden)

    terms = []
    for b, length in enumerate((7, 4)):  # each text alone, without padding
        words = text_tower.token_embedding(replaced[b, :length])
        words = torch.where(hidden[b, :length, None], model.mask_token, words)
        causal = torch.full((length, length), -torch.inf).triu(1)
        x = text_tower.transformer((words + text_tower.positional_embedding[:length])[None], attn_mask=causal)
        x = text_tower.ln_final(x)
        for block in model.decoder_blocks.layers:
            normed = block.norm1(x)
            x = x + block.self_attn(normed, normed, normed)[0]
            x = x + block.linear2(F.gelu(block.linear1(block.norm2(x))))
        logits = model.decoder_pred(model.decoder_blocks.norm(x))[0]
        for place in masked[b].nonzero()[:, 0].tolist():
            terms.append(-logits[place].log_softmax(0)[text[b, place]])
    expected = torch.stack(terms).mean()
    assert torch.allclose(model(text, text_tower), expected, rtol=1e-5)
    model.eval()
    assert torch.allclose(model(text, text_tower), expected, rtol=1e-5)


def test_language_loss_with_the_number_of_words_known():
    """The loss is the same when the caller gives the number of words, which saves a wait for the device."""
    texts = encode_words([[3, 9, 1, 7, 2], [], [4], [5, 6, 7]])
    model, text_tower = language_model(mask_ratio=0.5), tower()
    losses = []
    for num_words in (None, torch.tensor([5, 0, 1, 3])):
        torch.manual_seed(0)
        losses.append(model(texts, text_tower, num_words))
    assert torch.equal(*losses) and losses[0] > 1


def test_texts_without_words_have_no_language_loss():
    model = language_model()
    loss = model(encode_words([[], []]), tower())
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
