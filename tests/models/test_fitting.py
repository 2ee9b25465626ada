"""Parts of a model that do not fit each other are refused when it is built, with the right value."""

from __future__ import annotations

import pytest

from helpers import build_error


def test_teacher_whose_grid_cannot_match(milan_cfg):
    """40 pixels are no multiple of its patches; at 96 its grid is not the student's."""
    milan_cfg['head']['teacher']['input_size'] = 40
    message = build_error(milan_cfg)
    assert message == "The teacher's input_size=40 is not a multiple of its patch size 16; choose 32 or 48."
    milan_cfg['head']['teacher']['input_size'] = 96
    message = build_error(milan_cfg)
    assert message == 'head.teacher sees 36 patches and the encoder 16; set head.teacher.input_size to 64.'


def test_widths_that_do_not_fit(milan_cfg):
    milan_cfg['neck']['embed_dim'] = 64
    assert build_error(milan_cfg) == ('neck.embed_dim is 64, but the other parts of the model need 48; set it to that.')
    milan_cfg['neck'].update(embed_dim=48, predict_feature_dim=512)
    assert build_error(milan_cfg) == (
        'neck.predict_feature_dim is 512, but the other parts of the model need 24; set it to that.'
    )


@pytest.mark.parametrize(('option', 'value'), [('final_norm', False), ('pre_norm', True)])
def test_norms_that_do_not_fit(milan_cfg, option, value):
    """Without its last norm the masked forward has no output; a norm before the blocks it does not have."""
    milan_cfg['backbone'][option] = value
    assert build_error(milan_cfg).startswith(f'backbone.{option} is {value}, but the other parts of the model need')


def test_numbers_of_patches_that_do_not_fit(milan_cfg):
    milan_cfg['neck']['num_patches'] = 25
    assert 'neck.num_patches is 25' in build_error(milan_cfg)


def test_semantic_aware_masking_without_teacher(milan_cfg):
    milan_cfg['neck']['predict_feature_dim'] = 768
    milan_cfg['head'] = dict(type='mmmilan.PixelTarget')
    assert build_error(milan_cfg).startswith('SemanticAwareMasking needs a frozen teacher')


def test_pixel_target_with_another_patch_size(milan_cfg):
    milan_cfg['masking'] = dict(type='mmmilan.RandomMasking')
    milan_cfg['neck']['predict_feature_dim'] = 192
    milan_cfg['head'] = dict(type='mmmilan.PixelTarget', patch_size=8)
    assert build_error(milan_cfg).startswith('head.patch_size is 8, but the other parts of the model need 16')


def test_encoder_of_grey_images(milan_cfg):
    """Images are decoded to three channels, and the teacher takes three."""
    milan_cfg['backbone']['in_channels'] = 1
    assert build_error(milan_cfg).startswith('backbone.in_channels is 1, but images have 3 channels')


def test_rectangular_image_size(milan_cfg):
    """The decoder and the teacher have to be set to it too."""
    milan_cfg['backbone']['img_size'] = (64, 32)
    assert build_error(milan_cfg).startswith('neck.num_patches is 16, but the other parts of the model need (4, 2)')
    milan_cfg['neck']['num_patches'] = (4, 2)
    assert build_error(milan_cfg) == (
        'head.teacher sees 16 patches and the encoder (4, 2); set head.teacher.input_size to (64, 32).'
    )
