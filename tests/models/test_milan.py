"""MILAN: its state dict, its losses and predictions, and training on ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn

from helpers import assert_close, build_model, gradients, masked_batch
from mmmilan.engine import NonFiniteLossHook
from mmmilan.errors import InputError
from processes import run_group

# -- the teacher


def test_teacher_is_in_no_checkpoint(milan_cfg):
    model = build_model(milan_cfg)
    assert {key.split('.')[0] for key in model.state_dict()} == {'backbone', 'neck'}
    assert {name.split('.')[0] for name, _ in model.named_parameters()} == {'backbone', 'neck'}
    assert sum(p.numel() for p in model.head.teacher.parameters()) > 0


def test_teacher_stays_in_eval_mode_without_gradients(milan_cfg):
    model = build_model(milan_cfg)
    model.train()
    assert model.backbone.training and not any(module.training for module in model.head.teacher.modules())
    images, samples = masked_batch(2)
    model.requires_grad_(True)
    model.loss(images, samples)['loss'].backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.head.teacher.parameters())
    assert not model.head.run_teacher(images)[0].requires_grad


def test_teacher_moves_with_the_model(milan_cfg):
    model = build_model(milan_cfg)
    model.to(torch.float64)
    assert {p.dtype for p in model.head.teacher.parameters()} == {torch.float64}
    images, samples = masked_batch(2)
    assert model.head.run_teacher(images.double())[0].dtype == torch.float64
    assert torch.isfinite(model.loss(images.double(), samples)['loss'])
    model.to('meta')
    assert {p.device.type for p in model.head.teacher.parameters()} == {'meta'}


# -- losses and predictions


def test_predict_gives_mask_importance_and_losses(milan_cfg):
    model = build_model(milan_cfg)
    images, samples = masked_batch(4)
    masks = torch.stack([sample.mask for sample in samples])
    predicted = model(images, samples, mode='predict')
    patch_loss = torch.stack([sample.patch_loss for sample in predicted])
    importance = torch.stack([sample.importance for sample in predicted])
    assert torch.equal(torch.stack([sample.mask for sample in predicted]), masks)
    assert torch.equal(importance, model.head.run_teacher(images)[1])

    features, _ = model.head.run_teacher(images)
    index = masks.byte().argsort(dim=1, stable=True)
    pred = model.neck(model.backbone(images, index[:, :4]), index[:, :4], index[:, 4:])
    cosine = nn.functional.cosine_similarity
    cls_loss = 2 - 2 * cosine(pred[:, 0], features[:, 0], dim=-1)
    for b in range(4):  # in image order
        for position, patch in enumerate(index[b].tolist()):
            expected = 2 - 2 * cosine(pred[b, 1 + position], features[b, 1 + patch], dim=0)
            assert torch.allclose(patch_loss[b, patch], expected, atol=1e-5)
        image_loss = (cls_loss[b] + patch_loss[b].sum()) / 17
        assert torch.allclose(predicted[b].loss, image_loss, atol=1e-5)
    mean = torch.stack([sample.loss for sample in predicted]).mean()
    assert torch.allclose(mean, model(images, samples, mode='loss')['loss'], atol=1e-6)


def test_predict_without_data_samples_or_teacher(milan_cfg):
    milan_cfg['masking'] = dict(type='mmmilan.RandomMasking', mask_ratio=0.5)
    milan_cfg['neck']['predict_feature_dim'] = 768
    milan_cfg['head'] = dict(type='mmmilan.PixelTarget')
    model = build_model(milan_cfg)
    predicted = model.predict(masked_batch(3)[0])
    assert [int((~sample.mask).sum()) for sample in predicted] == [8] * 3
    assert all('importance' not in sample for sample in predicted)


def test_extract_feat_sees_whole_images(milan_cfg):
    milan_cfg['backbone']['out_type'] = 'raw'
    model = build_model(milan_cfg)
    images, _ = masked_batch(2)
    assert model(images)[0].shape == (2, 17, 48)


def test_class_token_counts_as_in_the_published_code(milan_cfg):
    """cls_token=False leaves the loss to the patches, as the paper writes it."""
    images, samples = masked_batch(4)
    patch_loss = [sample.patch_loss for sample in build_model(milan_cfg).predict(images, [s.clone() for s in samples])]
    milan_cfg['head']['cls_token'] = False
    loss = build_model(milan_cfg).loss(images, samples)['loss']
    assert torch.allclose(loss, torch.stack(patch_loss).mean(), atol=1e-6)


def test_distillation_counts_visible_patches_only(milan_cfg):
    milan_cfg['neck'] = dict(type='mmmilan.LinearProjection', embed_dim=48, predict_feature_dim=24)
    model = build_model(milan_cfg)
    images, samples = masked_batch(4)
    predicted = model.predict(images, [sample.clone() for sample in samples])
    for sample in predicted:
        assert torch.equal(sample.patch_loss.isnan(), sample.mask)

    features, _ = model.head.run_teacher(images)
    visible = torch.stack([(~sample.mask).nonzero()[:, 0] for sample in samples])
    seen = torch.cat([torch.zeros(4, 1, dtype=torch.int64), 1 + visible], dim=1)
    pred = model.neck.decoder_pred(model.backbone(images, visible))
    target = features[torch.arange(4)[:, None], seen]
    expected = (2 - 2 * nn.functional.cosine_similarity(pred, target, dim=-1)).mean()
    assert torch.allclose(model.loss(images, samples)['loss'], expected, atol=1e-6)


@pytest.mark.parametrize('norm_pix', [True, False])
def test_pixels_count_on_masked_patches_only(milan_cfg, norm_pix):
    """Semantic-aware masking with a pixel target (table 5, row 5): teacher for the draw, pixels for the loss."""
    milan_cfg['neck']['predict_feature_dim'] = 768
    milan_cfg['head'] |= dict(type='mmmilan.PixelTarget', norm_pix=norm_pix)
    model = build_model(milan_cfg)
    images, samples = masked_batch(4)
    result = model.reconstruct(images, model.supplied_patches(samples))
    assert result.importance is not None
    assert torch.allclose(result.image_loss, result.token_loss[:, 5:].mean(1), atol=1e-6)
    assert (result.image_loss - result.token_loss.mean(1)).abs().max() > 1e-3

    b, patch = 2, int(samples[2].mask.nonzero()[3])  # one patch by hand: rows, columns, channels
    row, column = divmod(patch, 4)
    pixels = images[b, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].permute(1, 2, 0).flatten()
    if norm_pix:
        pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
    visible, masked = result.predicted.split([4, 12], dim=1)
    position = 1 + result.predicted[b].tolist().index(patch)
    pred = model.neck(model.backbone(images, visible), visible, masked)
    assert torch.allclose(result.token_loss[b, position], (pred[b, position] - pixels).square().mean(), atol=1e-5)


# -- training


def distributed_step(folder: str, cfg: dict) -> None:
    """One rank's loss of its half of the batch and gradients averaged by DDP; then a loss that is NaN on one rank."""
    images, samples = masked_batch(8)
    rank = dist.get_rank()
    half = slice(4 * rank, 4 * rank + 4)
    model = MMDistributedDataParallel(build_model(cfg))
    loss = model(images[half], samples[half], mode='loss')['loss']
    loss.backward()
    state = dict(loss=loss.detach(), gradients=gradients(model.module))
    runner = SimpleNamespace(iter=4, epoch=0, work_dir=folder, hooks=[])
    try:
        NonFiniteLossHook().after_train_iter(runner, 0, outputs=dict(loss=torch.tensor([1.0, torch.nan][rank])))
    except InputError as error:
        state['stopped'] = str(error)
    torch.save(state, Path(folder, f'rank{rank}.pth'))


def test_two_ranks_equal_one_process_with_the_whole_batch(milan_cfg, tmp_path):
    run_group(distributed_step, str(tmp_path), milan_cfg)
    first, second = (torch.load(tmp_path / f'rank{rank}.pth') for rank in (0, 1))
    model = build_model(milan_cfg)
    loss = model.loss(*masked_batch(8))['loss']
    loss.backward()
    assert torch.allclose((first['loss'] + second['loss']) / 2, loss, rtol=1e-5, atol=0)
    assert first['loss'] != second['loss']
    assert_close(first['gradients'], gradients(model))
    assert_close(second['gradients'], first['gradients'], bound=0)
    # DDP spreads the bad gradients of one rank to both, so both stop
    assert first['stopped'] == second['stopped']
    assert first['stopped'].startswith('The loss is nan at iteration 5 (epoch 1)')


def test_accumulated_gradients_are_one_large_batch(milan_cfg):
    """With SGD, a step is proportional to the gradient."""
    images, samples = masked_batch(8)
    weights = []
    for parts in (1, 2, 4):
        model = build_model(milan_cfg)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        wrapper = OptimWrapper(optimizer, accumulative_counts=parts)
        wrapper.initialize_count_status(model, 0, parts)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for i in range(parts):
            part = slice(8 // parts * i, 8 // parts * (i + 1))
            model.train_step(dict(inputs=images[part], data_samples=samples[part]), wrapper)
        weights.append({name: model.get_parameter(name).detach() - value for name, value in before.items()})
    assert_close(weights[1], weights[0], bound=1e-5)
    assert_close(weights[2], weights[0], bound=1e-5)
