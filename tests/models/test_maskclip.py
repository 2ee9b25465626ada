"""MaskCLIP: its losses against small references, in one process and in two, and parts that do not fit."""

from __future__ import annotations

import math
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmpretrain.structures import DataSample
from torch import Tensor

from helpers import (
    assert_close,
    build_model,
    captioned_batch,
    encode_words,
    gradients,
    run_mean_teacher_hook,
    sum_losses,
)
from mmmilan.engine import BFloat16OptimWrapper, MeanTeacherHook
from mmmilan.errors import InputError
from mmmilan.models import MaskCLIP, MeanTeacher, maskclip
from mmmilan.models.maskclip_losses import is_word
from mmmilan.models.vit import gather_tokens
from mmmilan.registry import MODELS
from processes import run_group

# -- the contrastive loss


def test_it_is_clip_with_both_weights_zero(maskclip_cfg):
    """Loss and gradients equal those of open_clip's loss on the same features; the model has no other parts."""
    model = build_model(
        maskclip_cfg | dict(distillation_weight=0, language_weight=0, masking=None, neck=None, head=None, language=None)
    )
    parts = {name.split('.')[0] for name in model.state_dict()}
    assert parts == {'backbone', 'image_projection', 'text', 'logit_scale'}
    images, samples = captioned_batch(6)
    losses = model(images, samples, mode='loss')
    assert list(losses) == ['loss_contrastive', 'temperature']
    losses['loss_contrastive'].backward()
    actual = gradients(model)

    model.zero_grad()
    image = F.normalize(model.image_projection(model.backbone(images)[0]), dim=1)
    text = F.normalize(model.text(torch.stack([sample.text for sample in samples])), dim=1)
    expected = open_clip.ClipLoss()(image, text, model.logit_scale.exp())
    expected.backward()
    assert torch.allclose(losses['loss_contrastive'], expected, rtol=1e-6, atol=0)
    assert_close(actual, gradients(model))
    assert actual['logit_scale'] != 0


def test_temperature_has_a_floor(maskclip_cfg):
    model = build_model(maskclip_cfg)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(10)
    assert model.loss(*captioned_batch(2))['temperature'].item() == pytest.approx(0.01)
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_contrastive_loss_under_autocast():
    """Logits stay in float32."""
    image, text = (F.normalize(torch.randn(8, 24), dim=1) for _ in range(2))
    expected = maskclip.contrastive_loss(image, text, torch.tensor(100.0))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert maskclip.contrastive_loss(image, text, torch.tensor(100.0)) == expected


# -- training


class FixedDraws:
    """Replaces random masks by fixed ones: those of the images and texts from number ``start`` on."""

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


def test_training_in_bfloat16(maskclip_cfg, bfloat16):
    """Towers and decoders compute in bfloat16; losses and all weights and buffers stay in float32."""
    model = build_model(maskclip_cfg)
    FixedDraws(model, 0)
    images, samples = captioned_batch(8)
    expected = model.loss(images, samples)
    model.head.center.zero_()  # as before this loss
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    seen = []
    for part in (model.backbone.layers[0].attn.qkv, model.neck.decoder_pred, model.language.decoder_pred):
        part.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with wrapper.optim_context(model):
        losses = model.loss(images, samples)
    assert set(seen) == {torch.bfloat16}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert name == 'codewords' or torch.allclose(loss, expected[name], rtol=0.02), name  # a count may change by one
    wrapper.update_params(sum_losses(losses))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.slow
def test_training_learns_every_task(maskclip_cfg):
    """After 50 steps on 16 pairs, each image finds its text, and both other losses have fallen."""
    model = build_model(maskclip_cfg)
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=3e-3))
    images, samples = captioned_batch(16)
    pixels = images * 50 + 120
    hook = MeanTeacherHook(start=0.9, end=0.99)
    losses = []
    for step in range(50):
        losses.append(model.train_step(dict(inputs=pixels, data_samples=samples), wrapper))
        run_mean_teacher_hook(hook, model, step)
    for name in ('loss_contrastive', 'loss_distillation', 'loss_language'):
        start, end = (sum(row[name].item() for row in rows) for rows in (losses[:5], losses[-5:]))
        assert end < (0.2 if name == 'loss_contrastive' else 0.8) * start, name
    predicted = model.eval().test_step(dict(inputs=pixels, data_samples=samples))
    similarity = (
        torch.stack([s.image_embedding for s in predicted]) @ torch.cat([s.text_embedding for s in predicted]).T
    )
    assert similarity.argmax(1).tolist() == list(range(16))


def distributed_step(folder: str, maskclip_cfg: dict) -> None:
    images, samples = captioned_batch(8)
    rank = dist.get_rank()
    half = slice(4 * rank, 4 * rank + 4)
    model = build_model(maskclip_cfg)
    FixedDraws(model, 4 * rank)
    wrapper = MMDistributedDataParallel(model)
    losses = wrapper(images[half], samples[half], mode='loss')
    sum_losses(losses).backward()
    losses = {name: value.detach() for name, value in losses.items()}
    torch.save(dict(losses=losses, gradients=gradients(model)), Path(folder, f'rank{rank}.pth'))


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_the_whole_batch(maskclip_cfg, tmp_path):
    run_group(distributed_step, str(tmp_path), maskclip_cfg)
    first, second = (torch.load(tmp_path / f'rank{rank}.pth') for rank in (0, 1))
    model = build_model(maskclip_cfg)
    FixedDraws(model, 0)
    losses = model.loss(*captioned_batch(8))
    sum_losses(losses).backward()
    for name, value in losses.items():
        assert torch.allclose((first['losses'][name] + second['losses'][name]) / 2, value, rtol=1e-5, atol=0), name
        assert ('loss' in name) == (first['losses'][name] != second['losses'][name])
    assert_close(first['gradients'], gradients(model))
    assert_close(second['gradients'], first['gradients'], bound=0)


# -- masked self-distillation


@pytest.fixture
def distilled(maskclip_cfg):
    """A model with fixed outputs of decoder and teacher, and a fixed mask: (model, prediction, target, mask)."""
    model = build_model(maskclip_cfg)
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


def test_the_log_shows_the_use_of_codewords(maskclip_cfg):
    losses = build_model(maskclip_cfg).loss(*captioned_batch(4))
    assert 1 <= losses['codewords'] <= 20 and 0 < losses['codeword_entropy'] <= math.log(20)


def test_distillation_by_mean_squared_error(maskclip_cfg, distilled):
    _, pred, target, mask = distilled
    model = build_model(maskclip_cfg | dict(head=dict(type='mmmilan.FeatureTarget', feature_dim=48)))
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


def test_the_student_sees_visible_patches_and_the_teacher_all(maskclip_cfg):
    model = build_model(maskclip_cfg)
    mask = FixedDraws(model, 0).patches(None, (2, 16), torch.device('cpu'))
    seen = []
    for encoder in (model.backbone, model.mean_teacher.module):
        encoder.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model.distil(torch.randn(2, 3, 64, 64))
    teacher, student = seen
    assert teacher.tolist() == [list(range(16))] * 2
    assert student.tolist() == [(~row).nonzero()[:, 0].tolist() for row in mask]


def test_frozen_teacher_in_place_of_the_mean_teacher(maskclip_cfg, clip_file):
    """Its width differs from the encoder's; only the tokenizer has a mean teacher."""
    teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    maskclip_cfg['neck']['predict_feature_dim'] = maskclip_cfg['head']['feature_dim'] = 24
    maskclip_cfg['head']['teacher'] = teacher
    model = build_model(maskclip_cfg)
    assert not any(name.startswith(('mean_teacher', 'head._teacher')) for name in model.state_dict())
    assert [type(m).__name__ for m in model.modules() if isinstance(m, MeanTeacher)] == ['MeanTeacher']
    images, samples = captioned_batch(4)
    mask = FixedDraws(model, 0).patches(None, (4, 16), torch.device('cpu'))
    loss = model.loss(images, samples)['loss_distillation']
    loss.backward()
    assert not any(p.requires_grad for p in model.head.teacher.parameters())

    visible, masked = mask.byte().argsort(dim=1, stable=True).split([4, 12], dim=1)
    pred = model.neck(model.backbone(images, visible), visible, masked)[:, 5:]
    target = MODELS.build(teacher)(images)[0][:, 1:]
    target = torch.stack([tokens[row] for tokens, row in zip(target, mask, strict=True)])
    assignment = (model.head.tokenizer(target) / 0.07).softmax(-1)  # the mean tokenizer still equals the tokenizer
    expected = F.cross_entropy((model.head.tokenizer(pred) / 0.1).flatten(0, 1), assignment.flatten(0, 1))
    assert torch.allclose(loss, 0.05 * expected, rtol=1e-5)


def test_clip_and_mae(maskclip_cfg):
    """Pixels of the masked patches, normalised by patch, are what is predicted; there is no mean teacher."""
    maskclip_cfg['head'] = dict(type='mmmilan.PixelTarget', norm_pix=True)
    maskclip_cfg['neck']['predict_feature_dim'] = 768
    model = build_model(maskclip_cfg)
    assert model.mean_teacher is None
    images, samples = captioned_batch(4)
    mask = FixedDraws(model, 0).patches(None, (4, 16), torch.device('cpu'))
    loss = model.loss(images, samples)['loss_distillation']
    visible, masked = mask.byte().argsort(dim=1, stable=True).split([4, 12], dim=1)
    pred = model.neck(model.backbone(images, visible), visible, masked)[:, 5:]
    patches = F.unfold(images, 16, stride=16).transpose(1, 2).unflatten(2, (3, 256)).transpose(2, 3).flatten(2)
    target = torch.stack([rows[row] for rows, row in zip(patches, mask, strict=True)])
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(loss, 0.05 * F.mse_loss(pred, target), rtol=1e-5)


# -- what does not fit


def test_parts_that_do_not_fit(maskclip_cfg):
    for part, key, value in (('neck', 'embed_dim', 40), ('neck', 'num_patches', 9), ('head', 'feature_dim', 24)):
        with pytest.raises(InputError, match=f'{part}.{key} is {value}, but the other parts of the model need'):
            build_model(maskclip_cfg | {part: maskclip_cfg[part] | {key: value}})
    with pytest.raises(InputError, match='MaskCLIP has no neck; give its config, or set distillation_weight=0'):
        build_model(maskclip_cfg | dict(neck=None))
    with pytest.raises(InputError, match='MaskCLIP has no language; give its config, or set language_weight=0'):
        build_model(maskclip_cfg | dict(language=None))
    with pytest.raises(InputError, match='SemanticAwareMasking needs a frozen teacher'):
        build_model(maskclip_cfg | dict(masking=dict(type='mmmilan.SemanticAwareMasking')))


def test_missing_texts_and_texts_of_another_length(maskclip_cfg):
    model = build_model(maskclip_cfg)
    images, samples = captioned_batch(2)
    with pytest.raises(InputError, match='An image has no text; add TokenizeCaption'):
        model.loss(images, [samples[0], DataSample()])
    with pytest.raises(InputError, match='The texts have 9 tokens and model.text.context_length=12'):
        model.encode_text(encode_words([[1], [2]], length=9))
