"""DenseViT: the pretrained encoder's features, its positions, any image size, and both tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from helpers import ROOT, randomise, rest_slow
from mmmilan.errors import InputError
from mmmilan.models import DenseViT, MILANViT
from mmmilan.models.dense_vit import WindowAttention, relative_position_bias
from mmmilan.registry import MODELS

ARCH = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)
BLOCKS = (0, 1, 2, 3)


def dense_vit(**kwargs) -> DenseViT:
    return randomise(DenseViT(**dict(arch=ARCH, img_size=64, out_indices=BLOCKS) | kwargs))


@pytest.mark.parametrize('size', [(224, 224), (160, 272), (40, 225)])
def test_global_attention_gives_the_features_of_pretraining(size):
    """At the pretraining size and at others, where mmpretrain's own forward interpolates the positions."""
    encoder = randomise(MILANViT(ARCH, 224, 16, out_indices=list(BLOCKS), out_type='featmap', final_norm=False))
    dense = dense_vit(img_size=224)
    missing, unused = dense.load_state_dict(encoder.state_dict(), strict=False)
    assert {key.split('.')[0] for key in missing} == {'scales'} and not unused
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features, maps = encoder(images), dense(images)
        for scale, feature, result in zip(dense.scales, features, maps, strict=True):
            torch.testing.assert_close(result, scale(feature), rtol=0, atol=1e-5)
        torch.testing.assert_close(maps[2], features[2], rtol=0, atol=1e-5)


def test_named_blocks_attend_globally():
    model = dense_vit(window_size=2, global_indices=(1, 3), rel_pos_bias=True)
    assert [layer.attn.window_size for layer in model.layers] == [2, 0, 2, 0]
    assert [tuple(layer.attn.rel_pos_table.shape) for layer in model.layers] == [(3, 3, 3), (3, 7, 7)] * 2


@pytest.mark.parametrize('blocks', rest_slow([-1, 0, 1, 3, 4], 0, 3))
@pytest.mark.parametrize('options', [{}, dict(rel_pos_bias='shared', with_cls_token=False, window_size=2)])
def test_frozen_blocks_do_not_move(blocks, options):
    """Nor do the patch embedding, the class token and the positions; everything else does."""
    torch.manual_seed(0)
    options = options | (dict(global_indices=(1, 3)) if options else {})
    model = dense_vit(frozen_stages=blocks, drop_path_rate=0.1, **options).train()
    frozen = ('patch_embed', 'cls_token', 'pos_embed', *(f'layers.{i}.' for i in range(blocks)))
    if blocks <= 0:
        frozen = ()
    if blocks >= 3:
        frozen += ('rel_pos_shared.windows',)  # blocks 0 and 2
    if blocks == 4:
        frozen += ('rel_pos_shared.global',)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(4):  # stochastic depth skips a block now and then
        sum(each.square().mean() for each in model(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith(frozen)}
    assert [layer.training for layer in model.layers] == [i >= blocks for i in range(4)]


@pytest.mark.parametrize('blocks', [5, -2, 1.5, True, '2'])
def test_refused_frozen_stages(blocks):
    with pytest.raises(InputError, match=r'frozen_stages=.* of DenseViT is out of range; choose from -1 to 4\.'):
        dense_vit(frozen_stages=blocks)


def test_blocks_of_a_kind_share_a_table():
    """Two tables in all: one for windows, one for global blocks. Each has gradients and an effect."""
    model = dense_vit(window_size=2, global_indices=(1, 3), rel_pos_bias='shared', with_cls_token=False)
    shapes = {name: tuple(table.shape) for name, table in model.rel_pos_shared.items()}
    assert shapes == dict(windows=(3, 3, 3), **{'global': (3, 7, 7)})
    assert not any('rel_pos' in key for key in model.layers.state_dict())
    images = torch.randn(1, 3, 64, 64)
    last = model(images)[-1]
    last.square().mean().backward()
    for table in model.rel_pos_shared.values():
        assert table.grad.abs().max() > 0
        with torch.no_grad():
            table.normal_()
            assert (model(images)[-1] - last).abs().max() > 1e-4
            last = model(images)[-1]


def test_start_of_the_position_embedding(tmp_path):
    """It is interpolated from the checkpoint's; with ``sincos_pos_embed`` it starts anew as sine and cosine."""
    encoder = randomise(MILANViT(ARCH, 64, 16))
    torch.save(encoder.state_dict(), tmp_path / 'vit.pth')
    positions = {}
    for sincos in (False, True):
        model = dense_vit(
            img_size=96,
            with_cls_token=False,
            sincos_pos_embed=sincos,
            init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'vit.pth')),
        )
        model.init_weights()
        assert torch.equal(model.layers[3].attn.qkv.weight, encoder.layers[3].attn.qkv.weight)
        assert model.pos_embed.shape == (1, 36, 48) and model.pos_embed.requires_grad
        positions[sincos] = model.pos_embed.detach().unflatten(1, (6, 6))
    stored = encoder.pos_embed.detach()[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(stored, size=(6, 6), mode='bicubic', align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(positions[False], expected)
    rows = positions[True][0, :, :, :24]
    torch.testing.assert_close(rows[:, 0, 0], torch.arange(6.0).sin())
    assert torch.equal(rows[:, 0], rows[:, 5])  # the first half does not depend on the column


def test_sine_and_cosine_positions_of_a_rectangular_grid():
    model = DenseViT(ARCH, img_size=(64, 96), out_indices=BLOCKS, sincos_pos_embed=True)
    model.init_weights()
    positions = model.pos_embed.detach()[0, 1:].unflatten(0, (4, 6))
    for first, axis, length in ((0, 0, 4), (24, 1, 6)):
        along = positions[..., first : first + 24].select(1 - axis, 0)
        torch.testing.assert_close(along[:, 0], torch.arange(float(length)).sin())
        assert torch.equal(along, positions[..., first : first + 24].select(1 - axis, 3))


@pytest.mark.parametrize('options', [dict(rel_pos_bias=True), dict(rel_pos_bias='shared', with_cls_token=False)])
@pytest.mark.parametrize('size', [(1, 1), (17, 100), (33, 15), (75, 130)])
def test_any_image_size(size, options):
    """Images whose sides are no multiple of the patch; grids that no window divides, or smaller than a window."""
    model = dense_vit(window_size=3, global_indices=(3,), **options)
    rows, columns = (math.ceil(side / 16) for side in size)
    images = torch.randn(2, 3, *size)
    maps = model(images)
    scaled = [(4, 4), (2, 2), (1, 1)]
    shapes = [(2, 48, rows * i, columns * j) for i, j in scaled]
    assert [tuple(each.shape) for each in maps] == [*shapes, (2, 48, math.ceil(rows / 2), math.ceil(columns / 2))]
    padded = model(F.pad(images, (0, columns * 16 - size[1], 0, rows * 16 - size[0])))
    for result, expected in zip(maps, padded, strict=True):
        assert torch.equal(result, expected)
    alone = model(images[1:])  # images do not affect each other
    torch.testing.assert_close(maps[0][1:], alone[0], rtol=0, atol=1e-4)
    sum(each.square().mean() for each in maps).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize('options', [dict(rel_pos_bias=True), dict(rel_pos_bias='shared', with_cls_token=False)])
def test_checkpointing_changes_no_gradient(options):
    model = dense_vit(window_size=3, layer_scale_init_value=1.0, drop_path_rate=0.5, **options)
    model.train()
    images, gradients = torch.randn(2, 3, 64, 80), []
    for model.with_cp in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        sum(each.square().mean() for each in model(images)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize('options', [{}, dict(window_size=3), dict(with_cls_token=False)])
def test_roi_align_reads_the_maps(options):
    """Its features of a map are those of a contiguous copy; mmcv's misreads channels-last memory."""
    maps = dense_vit(**options)(torch.randn(2, 3, 64, 64))
    rois = torch.tensor([[0, 4.0, 6.0, 40.0, 50.0], [1, 10.0, 2.0, 60.0, 33.0]])
    for feature, stride in zip(maps, (4, 8, 16, 32), strict=True):
        feature = nn.Conv2d(feature.shape[1], 8, 1)(feature)  # keeps the memory format, as those of FPN do
        align = RoIAlign(7, 1 / stride, aligned=True)
        assert torch.equal(align(feature, rois), align(feature.contiguous(), rois))


def test_stochastic_depth_rises():
    model = dense_vit(drop_path_rate=0.3)
    assert [layer.attn.out_drop.drop_prob for layer in model.layers] == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(out_indices=(1, 3)), r'out_indices=\(1, 3\) of DenseViT are not four; name a block for each scale'),
        (dict(out_indices=(0, 1, 2, 4)), r'out_indices=\(0, 1, 2, 4\) .* choose from 0 to 3'),
        (dict(global_indices=(4,)), r'global_indices=\(4,\) .* choose from 0 to 3'),
        (dict(rel_pos_bias='own'), "rel_pos_bias='own' .*; choose True, False or 'shared'"),
        (dict(rel_pos_bias='shared'), 'set with_cls_token=False'),
    ],
)
def test_refused_options(arguments, message):
    with pytest.raises(InputError, match=message):
        dense_vit(**arguments)


def small_model(config: str, **backbone) -> nn.Module:
    """The model of a config on a small encoder."""
    cfg = Config.fromfile(ROOT / 'configs' / config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(
        arch=ARCH | dict(embed_dims=64, num_heads=4), out_indices=BLOCKS, init_cfg=None, **backbone
    )
    if cfg.default_scope == 'mmdet':
        cfg.model.neck.in_channels = [64] * 4
        cfg.model.train_cfg.rcnn.sampler.num = 16
        cfg.model.data_preprocessor.pad_size_divisor = 128
    else:
        cfg.model.decode_head.update(in_channels=[64] * 4, channels=32)
        cfg.model.auxiliary_head.update(in_channels=64, channels=32)
        cfg.model.data_preprocessor.size = (96, 96)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return revert_sync_batchnorm(model).train()


def check_losses(model: nn.Module, data: dict, expected: set[str]) -> None:
    losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    assert set(losses) == expected
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    loss.backward()
    for key, parameter in model.backbone.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key
    assert model.backbone.layers[0].attn.qkv.weight.grad.abs().max() > 0
    assert model.backbone.pos_embed.grad.abs().max() > 0


@pytest.mark.slow
def test_detector_trains_and_predicts():
    pytest.importorskip('mmdet')
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    model = small_model(
        'detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py',
        img_size=64,
        window_size=3,
        global_indices=(3,),
    )
    samples = []
    for height, width in [(90, 128), (128, 70)]:
        meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), img_id=0)
        sample = DetDataSample(metainfo=meta)
        masks = np.zeros((2, height, width), np.uint8)
        masks[0, 10:60, 5:50], masks[1, 20:40, 30:65] = 1, 1
        boxes = torch.tensor([[5.0, 10, 50, 60], [30, 20, 65, 40]])
        instances = dict(bboxes=boxes, labels=torch.tensor([3, 7]), masks=BitmapMasks(masks, height, width))
        sample.gt_instances = InstanceData(**instances)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    images = [torch.randint(0, 256, (3, *sample.img_shape), dtype=torch.uint8) for sample in samples]
    losses = {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'acc', 'loss_bbox', 'loss_mask'}
    check_losses(model, dict(inputs=images, data_samples=samples), losses)
    with torch.no_grad():
        results = model.eval().test_step(dict(inputs=images[:1], data_samples=samples[:1]))
    assert results[0].pred_instances.masks.shape[1:] == (90, 128)


def test_segmentor_trains_and_predicts():
    pytest.importorskip('mmseg')
    from mmseg.structures import SegDataSample

    model = small_model('segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py', img_size=64)
    samples = []
    for height, width in [(96, 90), (70, 96)]:
        sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, height, width)))
        samples.append(sample)
    images = [torch.randint(0, 256, (3, *sample.img_shape), dtype=torch.uint8) for sample in samples]
    losses = {'decode.loss_ce', 'decode.acc_seg', 'aux.loss_ce', 'aux.acc_seg'}
    check_losses(model, dict(inputs=images, data_samples=samples), losses)
    with torch.no_grad():
        results = model.eval().test_step(dict(inputs=images[:1], data_samples=samples[:1]))
    assert results[0].pred_sem_seg.data.shape == (1, 96, 90)


def slow_attention(
    attention: WindowAttention, tokens: Tensor, grid: tuple[int, int], side: int, table: Tensor, cls_bias: Tensor | None
) -> Tensor:
    """A loop over images, windows and queries. Windows are cut at the border, not padded."""
    heads, width = attention.num_heads, tokens.shape[-1] // attention.num_heads
    middle, extra = table.shape[1] // 2, 0 if cls_bias is None else 1
    result = torch.zeros_like(tokens)
    corners = [(i, j) for i in range(0, grid[0], side) for j in range(0, grid[1], side)]
    for image, x in enumerate(tokens):
        for top, left in corners:
            rows, columns = range(top, min(top + side, grid[0])), range(left, min(left + side, grid[1]))
            inside = [None] * extra + [(i, j) for i in rows for j in columns]  # None: the class token
            index = [0 if at is None else extra + at[0] * grid[1] + at[1] for at in inside]
            query, key, value = attention.qkv(x[index]).chunk(3, dim=-1)
            for n, of_query in enumerate(inside):
                outputs = []
                for head in range(heads):
                    part = slice(head * width, (head + 1) * width)
                    scores = key[:, part] @ query[n, part] / math.sqrt(width)
                    for m, of_key in enumerate(inside):
                        if of_query and of_key:
                            offset = [at - to + middle for at, to in zip(of_query, of_key, strict=True)]
                            scores[m] += table[head, offset[0], offset[1]]
                        else:
                            scores[m] += cls_bias[head, 1 if of_query else 0 if of_key else 2]
                    outputs.append(scores.softmax(dim=0) @ value[:, part])
                share = 1 if of_query else len(corners)  # the class token is in each window: the mean
                result[image, index[n]] += attention.proj(torch.cat(outputs)) / share
    return attention.gamma1(result)


GRIDS = [(6, 6), (5, 7), (3, 4), (2, 2)]  # whole windows, windows cut at the border, a grid smaller than a window


@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_windows_equal_a_slow_loop(grid):
    attention = randomise(WindowAttention(24, 3, window_size=3, rel_pos_grid=(3, 3), layer_scale_init_value=0.5))
    tokens = torch.randn(2, 1 + grid[0] * grid[1], 24)
    with torch.no_grad():
        expected = slow_attention(attention, tokens, grid, 3, attention.rel_pos_table, attention.rel_pos_cls)
        torch.testing.assert_close(attention(tokens, grid), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_windows_without_class_token_equal_a_slow_loop(grid):
    """As in MIMDet: patches alone, and a table that is passed in because blocks share it."""
    attention = randomise(WindowAttention(24, 3, window_size=3, with_cls_token=False))
    tokens, table = torch.randn(2, grid[0] * grid[1], 24), torch.randn(3, 5, 5)
    with torch.no_grad():
        expected = slow_attention(attention, tokens, grid, 3, table, None)
        torch.testing.assert_close(attention(tokens, grid, table), expected, rtol=0, atol=1e-5)


def test_global_attention_equals_a_slow_loop():
    attention = randomise(WindowAttention(24, 3, rel_pos_grid=(4, 4)))
    tokens = torch.randn(1, 17, 24)
    with torch.no_grad():
        expected = slow_attention(attention, tokens, (4, 4), 4, attention.rel_pos_table, attention.rel_pos_cls)
        torch.testing.assert_close(attention(tokens, (4, 4)), expected, rtol=0, atol=1e-5)


def test_windows_without_bias_ignore_padding():
    """Without a bias, the padding needs a mask of its own. A single window over the whole grid is global attention."""
    attention = randomise(WindowAttention(24, 3, window_size=5))
    everywhere = WindowAttention(24, 3).eval()
    everywhere.load_state_dict(attention.state_dict())
    tokens = torch.randn(2, 1 + 3 * 4, 24)
    torch.testing.assert_close(attention(tokens, (3, 4)), everywhere(tokens, (3, 4)), rtol=0, atol=1e-5)


def test_relative_positions_at_other_sizes():
    def bias_of(rows: int, columns: int) -> Tensor:
        bias = relative_position_bias(table, (rows, columns), torch.float32)
        return bias.unflatten(1, (rows, columns)).unflatten(3, (rows, columns))

    table = torch.randn(3, 7, 7)
    bias = bias_of(4, 4)
    assert torch.equal(bias[:, 3, 0, 0, 3], table[:, 6, 0])  # unchanged at the size of the table
    assert torch.equal(bias[:, 0, 1, 2, 0], table[:, 1, 4])
    bias = bias_of(6, 3)
    torch.testing.assert_close(bias[:, 2, 1, 2, 1], table[:, 3, 3])  # the center stays the center
    torch.testing.assert_close(bias[:, 5, 2, 3, 1], bias[:, 2, 1, 0, 0])  # only the offset counts
    table = torch.arange(7.0)[:, None].expand(3, 7, 7)  # rises over the rows
    bias = bias_of(6, 6)[0]
    assert (bias[1:, 0, 0, 0] > bias[:-1, 0, 0, 0]).all()
    torch.testing.assert_close(bias[3, 0, 0, 5], bias[3, 0, 0, 0])
