"""Rectangular images: encoder, decoders and the whole algorithm on a grid of 6 x 4 patches."""

from __future__ import annotations

import math

import pytest
import torch
from mmpretrain.structures import DataSample

from helpers import TINY_ARCH, build_model
from mmmilan.checkpoints.positions import sincos_position_embedding
from mmmilan.errors import InputError
from mmmilan.models import MILANViT
from mmmilan.visualization.pictures import draw_masked

GRID, SIZE = (6, 4), (96, 64)


def encoder(**kwargs) -> MILANViT:
    model = build_model(dict(type='mmmilan.MILANViT', arch=TINY_ARCH, img_size=SIZE, patch_size=16, **kwargs))
    model.eval()  # from which mmpretrain's backbones return None
    return model


@pytest.fixture
def rectangular_cfg(milan_cfg):
    """MAE, which needs no teacher, on the grid of 6 x 4 patches."""
    milan_cfg['backbone'].update(img_size=SIZE)
    milan_cfg['neck'].update(num_patches=GRID, predict_feature_dim=768)
    milan_cfg.update(masking=dict(type='mmmilan.RandomMasking'), head=dict(type='mmmilan.PixelTarget'))
    return milan_cfg


@pytest.mark.parametrize('grid', [(6, 4), (3, 7), (5, 5), (1, 2)])
def test_positions_are_those_of_row_and_column(grid):
    """Channel by channel, with Python's own sine and cosine."""
    positions = sincos_position_embedding(grid, 16)[0]
    assert positions.shape == (1 + math.prod(grid), 16) and not positions[0].any()
    for row in range(grid[0]):
        for column in range(grid[1]):
            waves = [10000 ** -(k / 4) for k in range(4)]
            expected = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in waves]
            actual = positions[1 + row * grid[1] + column]
            assert torch.allclose(actual, torch.tensor(expected), rtol=0, atol=1e-7), (row, column)


@torch.no_grad()
def test_encoder_sees_the_visible_patches_only():
    """All patches, in any order, equal mmpretrain's plain forward; a hidden patch has no influence."""
    model = encoder(out_type='raw')
    images = torch.randn(2, 3, *SIZE)
    order = torch.stack([torch.randperm(24) for _ in images])
    tokens = model(images, order)
    whole = model(images)[-1]
    assert torch.allclose(tokens[:, 0], whole[:, 0], atol=1e-5)
    assert torch.allclose(tokens[:, 1:], whole[:, 1:].gather(1, order[..., None].expand(-1, -1, 48)), atol=1e-5)

    seen = model(images, order[:, :8])
    row, column = divmod(int(order[0, 8]), 4)
    images[0, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 9.0
    assert torch.equal(model(images, order[:, :8]), seen)
    assert not torch.equal(model(images, order), tokens)


@torch.no_grad()
@pytest.mark.parametrize('decoder', ['PromptingDecoder', 'MAEDecoder'])
def test_loss_of_each_patch(rectangular_cfg, decoder):
    rectangular_cfg['neck']['type'] = f'mmmilan.{decoder}'
    model = build_model(rectangular_cfg).eval()
    assert torch.equal(model.neck.decoder_pos_embed.data, sincos_position_embedding(GRID, 32))
    images = torch.randn(2, 3, *SIZE)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[:, [3, 8, 9, 17, 20, 23]] = False
    predicted = model.predict(images, [DataSample().set_mask(each) for each in mask])

    visible, masked = (~mask).nonzero()[:, 1].view(2, -1), mask.nonzero()[:, 1].view(2, -1)
    pred = model.neck(model.backbone(images, visible), visible, masked)
    for b in range(2):
        for i, patch in enumerate(masked[b].tolist()):
            row, column = divmod(patch, 4)
            pixels = images[b, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            expected = (pred[b, 7 + i] - pixels.permute(1, 2, 0).flatten()).square().mean()
            assert torch.allclose(predicted[b].patch_loss[patch], expected, rtol=1e-5)
    loss = model.loss(images)['loss']
    assert torch.isfinite(loss) and model.predict(images)[0].mask.sum() == 18


@torch.no_grad()
def test_with_a_teacher(milan_cfg):
    """Teacher, masking, decoder, loss and joint space on the grid; the teacher's patches are where the image's are."""
    milan_cfg['backbone'].update(img_size=SIZE)
    milan_cfg['neck'].update(num_patches=GRID)
    milan_cfg['head']['teacher'].update(input_size=SIZE)
    model = build_model(milan_cfg).eval()
    images = torch.randn(2, 3, *SIZE)
    features, importance = model.head.run_teacher(images)
    assert features.shape == (2, 25, 24) and importance.shape == (2, 24)
    changed = images.clone()
    changed[:, :, 64:80, 16:32] = 5.0  # row 4, column 1
    distance = (model.head.run_teacher(changed)[0] - features)[:, 1:].norm(dim=-1)
    assert distance.argmax(1).tolist() == [17, 17]
    sample = model.predict(images)[0]
    assert sample.mask.sum() == 18 and torch.isfinite(sample.patch_loss).all()
    assert model.embed_joint(images).shape == (2, 25, 24)


def test_rectangle_learns_from_a_square(tmp_path):
    """Weights of square images load; their positions are interpolated to the grid."""
    square = build_model(dict(type='mmmilan.MILANViT', arch=TINY_ARCH, img_size=64, patch_size=16))
    torch.save(square.state_dict(), tmp_path / 'square.pth')
    start = dict(type='Pretrained', checkpoint=str(tmp_path / 'square.pth'))
    model = encoder(init_cfg=start)
    assert torch.equal(model.layers[1].attn.qkv.weight, square.layers[1].attn.qkv.weight)
    grid = square.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    grid = torch.nn.functional.interpolate(grid, GRID, mode='bicubic', align_corners=False)
    assert torch.allclose(model.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2), atol=1e-6)


def test_grids_that_do_not_fit(rectangular_cfg):
    def error(**changes) -> str:
        for key, value in changes.items():
            part, _, option = key.partition('_')
            rectangular_cfg[part][option] = value
        with pytest.raises(InputError) as caught:
            build_model(rectangular_cfg)
        return str(caught.value)

    assert error(neck_num_patches=16) == (
        'neck.num_patches is 16, but the other parts of the model need (6, 4); set it to that.'
    )
    assert 'neck.num_patches is (4, 6), but the other parts of the model need (6, 4)' in error(neck_num_patches=(4, 6))
    assert error(neck_num_patches=24) == 'num_patches=24 is not a square number; give (rows, columns) of the grid.'
    assert error(backbone_img_size=(100, 64)) == (
        'img_size=(100, 64) is not a multiple of patch_size=16; choose (112, 64).'
    )


def test_pictures_have_the_shape_of_the_image():
    image = torch.randint(0, 200, (96, 64, 3), dtype=torch.uint8).numpy()
    mask = torch.zeros(24, dtype=torch.bool)
    mask[4 * 4 + 1] = True  # row 4, column 1
    drawn = draw_masked(image, mask)
    assert (drawn[64:80, 16:32] == 225).all()
    drawn[64:80, 16:32] = image[64:80, 16:32]
    assert (drawn == image).all()
