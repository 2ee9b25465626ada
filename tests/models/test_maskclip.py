"""MaskCLIP: its losses against small references, its mean teacher, and where its weights can go."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmpretrain.structures import DataSample
from PIL import Image
from torch import Tensor

from helpers import assert_clip, assert_close, gradients, run_group
from mmmilan.checkpoints.layouts import convert
from mmmilan.engine import BFloat16OptimWrapper, MeanTeacherHook
from mmmilan.errors import InputError
from mmmilan.export.open_clip import write_open_clip
from mmmilan.export.preprocessing import Preprocessing
from mmmilan.models import CodewordTarget, MaskCLIP, MaskedLanguageModel, MeanTeacher, maskclip
from mmmilan.models.language import is_padding, is_word
from mmmilan.models.tokens import gather_tokens
from mmmilan.registry import MODELS

START, END = 38, 39  # of a text, in a vocabulary of 40 tokens
ARCH = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192)


@pytest.fixture
def cfg() -> dict:
    return dict(
        type='mmmilan.MaskCLIP',
        backbone=dict(type='mmmilan.MILANViT', arch=ARCH, img_size=64, patch_size=16),
        text=dict(context_length=12, vocab_size=40, width=32, heads=2, layers=2),
        embed_dim=24,
        masking=dict(type='mmmilan.RandomMasking', mask_ratio=0.75),
        neck=dict(
            type='mmmilan.MAEDecoder',
            num_patches=16,
            embed_dim=48,
            decoder_embed_dim=32,
            decoder_depth=1,
            decoder_num_heads=4,
            predict_feature_dim=48,
        ),
        head=dict(type='mmmilan.CodewordTarget', feature_dim=48, num_codewords=20),
        language=dict(type='mmmilan.MaskedLanguageModel', decoder_num_heads=4),
        data_preprocessor=dict(
            type='mmpretrain.SelfSupDataPreprocessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            to_rgb=True,
        ),
    )


def build(cfg: dict) -> MaskCLIP:
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def write(words: list[list[int]], length: int = 12) -> Tensor:
    """Texts of words [B, length] with start, end and padding."""
    texts = torch.zeros(len(words), length, dtype=torch.int64)
    for text, own in zip(texts, words, strict=True):
        text[: len(own) + 2] = torch.tensor([START, *own, END])
    return texts


def batch(size: int) -> tuple[Tensor, list[DataSample]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 64, 64, generator=generator)
    words = [torch.randint(38, (1 + i % 10,), generator=generator).tolist() for i in range(size)]
    samples = [DataSample() for _ in range(size)]
    for sample, text in zip(samples, write(words), strict=True):
        sample.set_field(text, 'text')
    return images, samples


def texts_of(samples: list[DataSample]) -> Tensor:
    return torch.stack([sample.text for sample in samples])


def total(losses: dict[str, Tensor]) -> Tensor:
    return sum(value for name, value in losses.items() if 'loss' in name)


# -- the contrastive loss


def test_it_is_clip_with_both_weights_zero(cfg):
    """Loss and gradients are those of open_clip's loss on the same features, and nothing else is in the model."""
    model = build(
        cfg | dict(distillation_weight=0, language_weight=0, masking=None, neck=None, head=None, language=None)
    )
    parts = {name.split('.')[0] for name in model.state_dict()}
    assert parts == {'backbone', 'image_projection', 'text', 'logit_scale'}
    images, samples = batch(6)
    losses = model(images, samples, mode='loss')
    assert list(losses) == ['loss_contrastive', 'temperature']
    losses['loss_contrastive'].backward()
    actual = gradients(model)

    model.zero_grad()
    image = F.normalize(model.image_projection(model.backbone(images)[0]), dim=1)
    text = F.normalize(model.text(texts_of(samples)), dim=1)
    expected = open_clip.ClipLoss()(image, text, model.logit_scale.exp())
    expected.backward()
    assert torch.allclose(losses['loss_contrastive'], expected, rtol=1e-6, atol=0)
    assert_close(actual, gradients(model))
    assert actual['logit_scale'] != 0


def test_temperature_has_a_floor(cfg):
    model = build(cfg)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(10)
    assert model.loss(*batch(2))['temperature'].item() == pytest.approx(0.01)
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_contrastive_loss_in_16_bits(cfg):
    """Mixed precision leaves the logits alone."""
    image, text = (F.normalize(torch.randn(8, 24), dim=1) for _ in range(2))
    expected = maskclip.contrastive_loss(image, text, torch.tensor(100.0))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert maskclip.contrastive_loss(image, text, torch.tensor(100.0)) == expected


def test_training_in_bfloat16(cfg, bfloat16):
    """Towers and decoders compute in 16 bits; losses, embeddings and what is averaged stay in 32."""
    model = build(cfg)
    FixedDraws(model, 0)
    images, samples = batch(8)
    expected = model.loss(images, samples)
    model.head.center.zero_()  # as it was
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    seen = []
    for part in (model.backbone.layers[0].attn.qkv, model.neck.decoder_pred, model.language.decoder_pred):
        part.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with wrapper.optim_context(model):
        losses = model.loss(images, samples)
    assert set(seen) == {torch.bfloat16}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert name == 'codewords' or torch.allclose(loss, expected[name], rtol=0.02), name  # a count jumps
    wrapper.update_params(total(losses))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_training_learns_every_task(cfg):
    """On 16 pairs: each image finds its text, and the two other losses fall as well."""
    model = build(cfg)
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=3e-3))
    images, samples = batch(16)
    pixels = images * 50 + 120
    hook = MeanTeacherHook(start=0.9, end=0.99)
    losses = []
    for step in range(50):
        losses.append(model.train_step(dict(inputs=pixels, data_samples=samples), wrapper))
        run_hook(hook, model, step)
    for name in ('loss_contrastive', 'loss_distillation', 'loss_language'):
        start, end = (sum(row[name].item() for row in rows) for rows in (losses[:5], losses[-5:]))
        assert end < (0.2 if name == 'loss_contrastive' else 0.8) * start, name
    predicted = model.eval().test_step(dict(inputs=pixels, data_samples=samples))
    similarity = (
        torch.stack([s.image_embedding for s in predicted]) @ torch.cat([s.text_embedding for s in predicted]).T
    )
    assert similarity.argmax(1).tolist() == list(range(16))


class FixedDraws:
    """In place of random masks: those of the images and texts number ``start`` and following."""

    def __init__(self, model: MaskCLIP, start: int) -> None:
        self.start = start
        model.masking.draw = self.patches
        model.language.draw = self.words
        model.language.corrupt = lambda text, masked: (text, masked)

    def patches(self, importance: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
        draws = torch.rand(8, 16, generator=torch.Generator().manual_seed(2))[self.start :][: shape[0]]
        return draws.argsort(1).argsort(1) >= 4

    def words(self, text: Tensor) -> Tensor:
        draws = torch.rand(8, 12, generator=torch.Generator().manual_seed(3))[self.start :][: len(text)]
        return is_word(text) & (draws < 0.6)


def distributed_step(folder: str, cfg: dict) -> None:
    images, samples = batch(8)
    rank = dist.get_rank()
    half = slice(4 * rank, 4 * rank + 4)
    model = build(cfg)
    FixedDraws(model, 4 * rank)
    wrapper = MMDistributedDataParallel(model)
    losses = wrapper(images[half], samples[half], mode='loss')
    total(losses).backward()
    losses = {name: value.detach() for name, value in losses.items()}
    torch.save(dict(losses=losses, gradients=gradients(model)), Path(folder, f'rank{rank}.pth'))


def test_two_processes_are_one_with_the_same_batch(cfg, tmp_path):
    run_group(distributed_step, str(tmp_path), cfg)
    first, second = (torch.load(tmp_path / f'rank{rank}.pth') for rank in (0, 1))
    model = build(cfg)
    FixedDraws(model, 0)
    losses = model.loss(*batch(8))
    total(losses).backward()
    for name, value in losses.items():
        assert torch.allclose((first['losses'][name] + second['losses'][name]) / 2, value, rtol=1e-5, atol=0), name
        assert ('loss' in name) == (first['losses'][name] != second['losses'][name])
    assert_close(first['gradients'], gradients(model))
    assert_close(second['gradients'], first['gradients'], bound=0)


# -- masked self-distillation


@pytest.fixture
def distilled(cfg):
    """A model whose decoder and teacher give known numbers: prediction, target, mask."""
    model = build(cfg)
    pred, target = torch.randn(3, 17, 48), torch.randn(3, 17, 48)
    mask = FixedDraws(model, 0).patches(None, (3, 16), torch.device('cpu'))
    model.neck.forward = (
        lambda latent, visible, masked: torch.cat(  # in the decoder's order
            [pred[:, :1], gather_tokens(pred[:, 1:], torch.cat([visible, masked], dim=1))], dim=1
        )
    )
    model.mean_teacher.forward = lambda images, visible: target
    return model, pred, target, mask


def test_distillation_is_the_cross_entropy_of_soft_assignments(distilled):
    model, pred, target, mask = distilled
    head = model.head
    head.mean_tokenizer.module.weight.normal_()
    terms = []
    for b in range(3):
        for n in mask[b].nonzero()[:, 0].tolist():
            student = [math.exp(x / 0.1) for x in head.tokenizer(pred[b, 1 + n]).double().tolist()]
            teacher = [math.exp(x / 0.07) for x in head.mean_tokenizer(target[b, 1 + n]).double().sub(20).tolist()]
            terms.append(
                -sum(q / sum(teacher) * math.log(p / sum(student)) for p, q in zip(student, teacher, strict=True))
            )
    assert len(terms) == 3 * 12
    loss = model.distil(torch.randn(3, 3, 64, 64))
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize('momentum', [0.9, None])
def test_center_and_temperature(momentum):
    """Of three batches, against iBOT's two formulas; evaluation changes nothing."""
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
    """Four tokens that choose three codewords, two of them the same."""
    head = CodewordTarget(5, 5, teacher_temperature=0.01)
    with torch.no_grad():
        for value in (head.mean_tokenizer.module.weight, head.mean_tokenizer.module.bias):
            value.copy_(torch.eye(5) if value.ndim == 2 else torch.zeros(5))
    tokens = torch.eye(5)[torch.tensor([[0, 2], [2, 4]])]
    head.token_loss(tokens, tokens)
    assert head.statistics['codewords'] == 3
    expected = -(2 * 0.25 * math.log(0.25) + 0.5 * math.log(0.5))
    assert head.statistics['codeword_entropy'].item() == pytest.approx(expected, rel=1e-5)


def test_the_log_shows_the_use_of_codewords(cfg):
    losses = build(cfg).loss(*batch(4))
    assert 1 <= losses['codewords'] <= 20 and 0 < losses['codeword_entropy'] <= math.log(20)


def test_distillation_by_mean_squared_error(cfg, distilled):
    _, pred, target, mask = distilled
    model = build(cfg | dict(head=dict(type='mmmilan.FeatureTarget', feature_dim=48)))
    model.masking, model.neck, model.mean_teacher = (
        getattr(distilled[0], n) for n in ('masking', 'neck', 'mean_teacher')
    )
    expected = sum((pred[b, 1 + n] - target[b, 1 + n]).square().sum() for b, n in mask.nonzero().tolist()) / (36 * 48)
    assert model.distil(torch.randn(3, 3, 64, 64)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_masked_patches_are_distilled(distilled):
    model, pred, target, mask = distilled
    model.head.eval()  # center and temperature stay
    images = torch.randn(3, 3, 64, 64)
    before = model.distil(images)
    for tokens in (pred, target):
        tokens[:, 0] += 1
        tokens[:, 1:][~mask] += 1
    assert model.distil(images) == before
    target[0, 1 + int(mask[0].nonzero()[0])] *= -1
    assert model.distil(images) != before


def test_the_student_sees_visible_patches_and_the_teacher_all(cfg):
    model = build(cfg)
    mask = FixedDraws(model, 0).patches(None, (2, 16), torch.device('cpu'))
    seen = []
    for encoder in (model.backbone, model.mean_teacher.module):
        encoder.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model.distil(torch.randn(2, 3, 64, 64))
    teacher, student = seen
    assert teacher.tolist() == [list(range(16))] * 2
    assert student.tolist() == [(~row).nonzero()[:, 0].tolist() for row in mask]


def test_frozen_teacher_in_place_of_the_mean_teacher(cfg, clip_file):
    """Its width is not the encoder's; only the tokenizer has an average."""
    teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    cfg['neck']['predict_feature_dim'] = cfg['head']['feature_dim'] = 24
    cfg['head']['teacher'] = teacher
    model = build(cfg)
    assert not any(name.startswith(('mean_teacher', 'head._teacher')) for name in model.state_dict())
    assert [type(m).__name__ for m in model.modules() if isinstance(m, MeanTeacher)] == ['MeanTeacher']
    images, samples = batch(4)
    mask = FixedDraws(model, 0).patches(None, (4, 16), torch.device('cpu'))
    loss = model.loss(images, samples)['loss_distillation']
    loss.backward()
    assert not any(p.requires_grad for p in model.head.teacher.parameters())

    visible, masked = mask.byte().argsort(dim=1, stable=True).split([4, 12], dim=1)
    pred = model.neck(model.backbone(images, visible), visible, masked)[:, 5:]
    target = MODELS.build(teacher)(images)[0][:, 1:]
    target = torch.stack([tokens[row] for tokens, row in zip(target, mask, strict=True)])
    assignment = (model.head.tokenizer(target) / 0.07).softmax(-1)  # the average is still the tokenizer
    expected = F.cross_entropy((model.head.tokenizer(pred) / 0.1).flatten(0, 1), assignment.flatten(0, 1))
    assert torch.allclose(loss, 0.05 * expected, rtol=1e-5)


def test_parts_that_do_not_fit(cfg):
    for part, key, value in (('neck', 'embed_dim', 40), ('neck', 'num_patches', 9), ('head', 'feature_dim', 24)):
        with pytest.raises(InputError, match=f'{part}.{key} is {value}, but the other parts of the model need'):
            build(cfg | {part: cfg[part] | {key: value}})
    with pytest.raises(InputError, match='MaskCLIP has no neck; give its config, or set distillation_weight=0'):
        build(cfg | dict(neck=None))
    with pytest.raises(InputError, match='MaskCLIP has no language; give its config, or set language_weight=0'):
        build(cfg | dict(language=None))
    with pytest.raises(InputError, match='SemanticAwareMasking needs a frozen teacher'):
        build(cfg | dict(masking=dict(type='mmmilan.SemanticAwareMasking')))


def test_texts_that_are_missing_or_of_another_length(cfg):
    model = build(cfg)
    images, samples = batch(2)
    with pytest.raises(InputError, match='An image has no text; add TokenizeCaption'):
        model.loss(images, [samples[0], DataSample()])
    with pytest.raises(InputError, match='The texts have 9 tokens and model.text.context_length=12'):
        model.encode_text(write([[1], [2]], length=9))


# -- the mean teacher


def test_mean_teacher_is_no_parameter_but_saved(cfg):
    model = build(cfg)
    own = {name for name in model.state_dict() if name.startswith(('mean_teacher.', 'head.mean_tokenizer.'))}
    assert own == {f'mean_teacher.module.{name}' for name in model.backbone.state_dict()} | {
        f'head.mean_tokenizer.module.{name}' for name in ('weight', 'bias')
    }
    assert not own & {name for name, _ in model.named_parameters()}
    model.train()
    assert not any(module.training for module in model.mean_teacher.modules())
    for name, weight in model.backbone.state_dict().items():  # it starts as its student
        assert torch.equal(model.state_dict()[f'mean_teacher.module.{name}'], weight), name


def test_mean_teacher_gets_no_gradient(cfg):
    model = build(cfg)
    model.requires_grad_(True)
    images, samples = batch(3)
    assert not model.encode_tokens(model.mean_teacher, images).requires_grad
    total(model.loss(images, samples)).backward()
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in model.mean_teacher.buffers())
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {'backbone.cls_token', 'neck.mask_token', 'head.tokenizer.weight', 'language.mask_token'} <= trained


def test_mean_teacher_follows_its_formula():
    """In double precision, over steps whose momentum changes, from the first one on."""
    student = torch.nn.Linear(5, 7)
    teacher = MeanTeacher(student)
    expected = student.weight.detach().double().clone()
    for step in range(50):
        student.weight.data.normal_()
        momentum = 0.9 + 0.0019 * step
        teacher.update(momentum)
        expected = momentum * expected + (1 - momentum) * student.weight.detach().double()
        assert torch.allclose(teacher.module.weight.double(), expected, rtol=0, atol=1e-6)


def run_hook(hook: MeanTeacherHook, model: torch.nn.Module, iteration: int, updated: bool = True) -> None:
    wrapper = SimpleNamespace(should_update=lambda: updated)
    hook.after_train_iter(SimpleNamespace(model=model, optim_wrapper=wrapper, iter=iteration, max_iters=100), 0)


def test_momentum_rises_from_start_to_end():
    hook = MeanTeacherHook()
    assert [hook.momentum(i, 101) for i in (0, 50, 100)] == pytest.approx([0.999, 0.99945, 0.9999], abs=1e-12)
    assert hook.momentum(0, 1) == 0.999
    with pytest.raises(InputError, match='choose 0 <= start <= end <= 1'):
        MeanTeacherHook(start=0.9, end=0.5)


@pytest.mark.parametrize('iteration,momentum', [(0, 0.5), (99, 0.75)])
def test_hook_moves_every_mean_teacher(cfg, iteration, momentum):
    model = build(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.add_(1)
    hook = MeanTeacherHook(start=0.5, end=0.75)
    run_hook(hook, model, iteration, updated=False)  # gradients were only accumulated
    assert torch.equal(model.mean_teacher.module.cls_token, before['backbone.cls_token'])
    run_hook(hook, model, iteration)
    for teacher, student in (('mean_teacher.module', 'backbone'), ('head.mean_tokenizer.module', 'head.tokenizer')):
        for name in (name for name in before if name.startswith(f'{student}.')):
            actual = model.state_dict()[name.replace(student, teacher, 1)]
            assert torch.allclose(actual, before[name] + 1 - momentum, atol=1e-6), name


# -- masked language modelling


def language_model(**kwargs) -> MaskedLanguageModel:
    model = MaskedLanguageModel(width=32, vocab_size=40, decoder_num_heads=4, **kwargs)
    model.init_weights()
    return model


def tower() -> torch.nn.Module:
    return open_clip.transformer.TextTransformer(12, 40, 32, heads=2, layers=2, output_dim=8)


def test_words_and_padding():
    text = write([[5, 0, 7], [], [1] * 10])  # 0 is a word as well as what pads
    assert is_word(text).sum(1).tolist() == [3, 0, 10]
    assert is_word(text)[0, 1:4].all()
    assert is_padding(text).sum(1).tolist() == [7, 10, 0]
    assert not (is_word(text) & is_padding(text)).any()


def test_a_fifth_of_the_words_is_masked_and_nothing_else():
    text = write([[3] * 10, [0, 1], [4] * 7, []]).repeat(500, 1)
    masked = language_model().draw(text)
    assert masked.sum(1).tolist() == [2, 1, 1, 0] * 500
    assert not (masked & ((text >= START) | is_padding(text))).any()
    share = masked.float().reshape(500, 4, 12).mean(0)
    assert torch.allclose(share[0, 1:11], torch.full((10,), 0.2), atol=0.06)  # every word as often


def test_masked_words_are_replaced_as_bert_does():
    text = write([[3] * 10] * 2000)
    masked = is_word(text)
    corrupted, hidden = language_model().corrupt(text, masked)
    assert torch.equal(corrupted[~masked], text[~masked]) and not (hidden & ~masked).any()
    assert hidden[masked].float().mean().item() == pytest.approx(0.8, abs=0.01)
    random = corrupted[masked & ~hidden]
    assert (random != 3).float().mean().item() == pytest.approx(0.5 * 37 / 38, abs=0.02)
    assert random.max() == START - 1 and random.min() == 0  # words, never start or end


def test_language_loss_is_the_cross_entropy_of_masked_words():
    model, text_tower = language_model(), tower()
    text = write([[3, 9, 1, 7, 2], [30, 31]])
    masked = torch.zeros_like(text, dtype=torch.bool)
    masked[0, 2] = masked[0, 5] = masked[1, 1] = True
    replaced = text.clone()
    replaced[0, 5] = 11
    hidden = masked.clone()
    hidden[0, 5] = False
    model.draw, model.corrupt = lambda text: masked, lambda text, masked: (replaced, hidden)

    terms = []
    for b, length in enumerate((7, 4)):  # each text alone, without its padding
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
    """The same without asking the device how many words are masked."""
    texts = write([[3, 9, 1, 7, 2], [], [4], [5, 6, 7]])
    model, text_tower = language_model(mask_ratio=0.5), tower()
    losses = []
    for num_words in (None, torch.tensor([5, 0, 1, 3])):
        torch.manual_seed(0)
        losses.append(model(texts, text_tower, num_words))
    assert torch.equal(*losses) and losses[0] > 1


def test_texts_without_words_have_no_language_loss():
    model = language_model()
    loss = model(write([[], []]), tower())
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


# -- where the weights can go

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PREPROCESSING = Preprocessing(resize=64, size=(64, 64), interpolation='bicubic', mean=MEAN, std=STD)


@pytest.fixture
def trained(cfg, tmp_path):
    """A model with weights far from their start, and its checkpoint."""
    model = build(cfg)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name != 'logit_scale':
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    path = tmp_path / 'epoch_25.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return model.eval(), str(path)


@torch.no_grad()
def test_open_clip_loads_the_export_and_gives_the_same_embeddings(trained, tmp_path):
    model, _ = trained
    write_open_clip(model, PREPROCESSING, tmp_path / 'export')
    clip, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{tmp_path / "export"}')
    clip.eval()
    picture = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    bgr = picture.flip(3).permute(0, 3, 1, 2)  # as the data pipeline gives it
    own = model.data_preprocessor(dict(inputs=bgr, data_samples=None))['inputs']
    given = torch.stack([preprocess(Image.fromarray(pixels.numpy())) for pixels in picture])
    text = texts_of(batch(5)[1])
    for actual, expected in (
        (clip.encode_image(given, normalize=True), model.encode_image(own)),
        (clip.encode_text(text, normalize=True), model.encode_text(text)),
        (clip.logit_scale, model.logit_scale),
    ):
        assert (actual - expected).abs().max() < 1e-5
    assert (model.encode_image(own)[0] - model.encode_image(own)[1]).norm() > 0.01  # images differ


def test_checkpoint_is_a_teacher(trained, cfg, tmp_path):
    """Features of all tokens and attention of the class token are those of open_clip's own tower."""
    model, path = trained
    write_open_clip(model, PREPROCESSING, tmp_path / 'export')
    visual = open_clip.create_model(f'local-dir:{tmp_path / "export"}').eval().visual
    images = torch.randn(3, 3, 64, 64)
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=path, head_width=16)).eval()
    assert (teacher.feature_dim, teacher.patch_size, teacher.num_patches) == (24, 16, 16)
    assert_clip(teacher, images, visual, images)
    assert torch.allclose(F.normalize(teacher(images)[0][:, 0], dim=1), model.encode_image(images), atol=1e-5)
    with pytest.raises(InputError, match='48 wide, no multiple of head_width=64'):
        MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=path))
    meta = dict(cfg=Config(dict(model=cfg)).pretty_text)  # as training writes it
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'with_config.pth')
    itself = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(tmp_path / 'with_config.pth'))).eval()
    assert all(torch.equal(*pair) for pair in zip(itself(images), teacher(images), strict=True))


def test_a_rectangular_checkpoint_is_a_teacher(cfg, tmp_path):
    """Its config says so; the weights would fit a grid of other sides."""
    cfg['backbone']['img_size'] = (32, 96)
    cfg['neck']['num_patches'] = (2, 6)
    model = build(cfg).eval()
    path = tmp_path / 'rectangle.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=Config(dict(model=cfg)).pretty_text)), path)
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(path))).eval()
    images = torch.randn(3, 3, 32, 96)
    assert teacher.num_patches == 12
    assert torch.allclose(F.normalize(teacher(images)[0][:, 0], dim=1), model.encode_image(images), atol=1e-5)


def test_milan_trains_on_a_checkpoint(trained, milan_cfg):
    milan_cfg['head']['teacher'] = dict(type='mmmilan.OpenCLIPTeacher', pretrained=trained[1], head_width=16)
    model = MODELS.build(milan_cfg)
    model.init_weights()
    loss = model.loss(torch.randn(2, 3, 64, 64))['loss']
    loss.backward()
    assert 0 < loss < 4


@pytest.mark.parametrize('kind', ['mmmilan.MILANViT', 'mmpretrain.VisionTransformer', 'mmmilan.DenseViT'])
def test_encoder_of_a_checkpoint(trained, safe_mmengine, kind):  # noqa: F811
    model, path = trained
    extra = dict(out_indices=(0, 1, 1, 1)) if 'Dense' in kind else {}
    encoder = dict(type=kind, arch=ARCH, img_size=64, patch_size=16, init_cfg=dict(type='Pretrained', checkpoint=path))
    encoder = MODELS.build(encoder | extra)
    encoder.init_weights()
    loaded = encoder.state_dict()
    for name, weight in model.backbone.state_dict().items():
        assert name.startswith('ln1') or torch.equal(loaded[name], weight), name
    if not extra:
        encoder.eval()
        images = torch.randn(2, 3, 64, 64)
        assert torch.allclose(encoder(images)[0], model.backbone(images)[0], atol=1e-6)


def test_encoder_converts_to_other_layouts(trained):
    model, path = trained
    weights = torch.load(path)['state_dict']
    assert set(convert(weights, 'mmmilan')) == {key for key in weights if not key.startswith('data_preprocessor.')}
    encoder = convert(weights, 'timm', encoder_only=True)
    assert torch.equal(encoder['blocks.1.attn.qkv.weight'], model.backbone.layers[1].attn.qkv.weight)
    with pytest.raises(InputError, match='has no place for a MaskCLIP; convert its encoder'):
        convert(weights, 'timm')


def test_export_of_what_open_clip_cannot_hold(cfg, tmp_path):
    cfg['backbone']['layer_scale_init_value'] = 1.0
    with pytest.raises(InputError, match="open_clip's ViT has no place for 'backbone.layers.0.attn.gamma1.weight'"):
        write_open_clip(build(cfg), PREPROCESSING, tmp_path)
    assert not list(tmp_path.glob('open_clip*'))
