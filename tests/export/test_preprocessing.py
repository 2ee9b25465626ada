"""The preparation of images in the words of other libraries, or an error where they have none."""

from __future__ import annotations

import pytest

import mmmilan
from mmmilan.errors import InputError
from mmmilan.export.preprocessing import Preprocessing, normalisation, read_preprocessing

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize(('resize', 'size'), [(256, 224), (384, 384), (438, 384), (232, 224), (235, 192)])
def test_timms_crop_gives_the_same_short_side(resize, size):
    settings = Preprocessing(resize, (size, size), 'bicubic', [0.5] * 3, [0.5] * 3).timm()
    assert int(size / settings['crop_pct']) == resize


def test_pipelines_that_other_libraries_cannot_express(trained):
    config, _ = trained('milan')
    model = mmmilan.get_model(config)
    pipeline = model._config.test_dataloader.dataset.pipeline
    pipeline[2].crop_size = 24
    with pytest.raises(InputError, match=r'gives images of \(24, 24\) but img_size=\(32, 32\); make them equal'):
        read_preprocessing(model._config, model)
    pipeline[1:3] = [dict(type='Resize', scale=(32, 32), interpolation='area')]
    settings = read_preprocessing(model._config, model)
    assert settings == Preprocessing(None, (32, 32), 'area', MEAN, STD, 'cv2')
    assert settings.timm()['interpolation'] == settings.open_clip()['interpolation'] == 'bilinear'
    pipeline[1]['interpolation'] = 'lanczos'
    with pytest.raises(InputError, match="Other libraries do not have the interpolation 'lanczos'"):
        read_preprocessing(model._config, model)
    pipeline[1:2] = [dict(type='Resize', scale=(32, 32)), dict(type='Pad', size=(64, 64))]
    with pytest.raises(InputError, match=r'as the test pipeline does \(LoadImage, Resize, Pad, PackInputs\); use'):
        read_preprocessing(model._config, model)
    pipeline[1:3] = [dict(type='RandomCrop', crop_size=32)]
    with pytest.raises(InputError, match=r'as the test pipeline does \(LoadImage, RandomCrop, PackInputs\); use'):
        read_preprocessing(model._config, model)


def test_crops_that_other_libraries_cannot_express():
    with pytest.raises(InputError, match='timm cannot be told to resize the short side and crop 32 x 48 pixels; give'):
        Preprocessing(64, (32, 48), 'bicubic', MEAN, STD).timm()
    with pytest.raises(InputError, match='open_clip cannot be told to resize the short side and crop 32 x 48 pixels'):
        Preprocessing(32, (32, 48), 'bicubic', MEAN, STD).open_clip()
    with pytest.raises(InputError, match='resizes the short side to 32 pixels .* the test pipeline to 36; set the sc'):
        Preprocessing(36, (32, 32), 'bicubic', MEAN, STD).open_clip()
    with pytest.raises(InputError, match="open_clip has no interpolation 'nearest'"):
        Preprocessing(32, (32, 32), 'nearest', MEAN, STD).open_clip()


def test_a_model_of_bgr_images(trained):
    """Other libraries give RGB; the statistics that an ONNX file states are of RGB, too."""
    config, _ = trained('milan')
    model = mmmilan.get_model(config)
    assert normalisation(model) == (MEAN, STD)
    model.data_preprocessor.to_rgb = model.data_preprocessor._channel_conversion = False
    assert normalisation(model) == (MEAN[::-1], STD[::-1])
    with pytest.raises(InputError, match=r'The model takes BGR images \(data_preprocessor.to_rgb=False\)'):
        read_preprocessing(model._config, model)
