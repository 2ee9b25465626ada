"""The config in a checkpoint, or beside it, is read as data."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import mmmilan
from helpers import ROOT
from mmmilan.checkpoints.config import own_config, parse_config
from mmmilan.errors import InputError
from mmmilan.registry import MODELS

CONFIGS = (
    'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py',
    'configs/maskclip/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py',
    'configs/milan/benchmarks/vit-base-p16_knn_in1k.py',
    'configs/demo/mask-rcnn_vit-tiny-p8_scenes.py',
    'configs/demo/upernet_vit-tiny-p8_scenes.py',
)


@pytest.mark.parametrize('path', CONFIGS)
def test_configs_dumped_by_mmengine_are_read_back(path):
    cfg = Config.fromfile(ROOT / path)
    assert parse_config(cfg.pretty_text, path).to_dict() == cfg.to_dict()


@pytest.mark.parametrize(
    'line',
    [
        'x = __import__("os").system("true")',
        'x = open("/etc/passwd")',
        'x = dict(a=[print(1)])',
        'import os',
        'x = (lambda: 3)()',
        'x = dict(**y)',
        'x = {**y}',
        'x.y = 3',
        'x = y',
        'x = dict([1], a=2)',
        'x = f"{y}"',
        'x = [i for i in range(9)]',
    ],
)
def test_nothing_is_executed(line):
    with pytest.raises(InputError, match='Line 2 of bad.py is not plain data'):
        parse_config(f'a = 1\n{line}\n', 'bad.py')


def test_negative_and_infinite_numbers():
    text = 'a = dict(b=-1e-05, c=(1, -inf), d={1: None}, e=float)'
    with pytest.raises(InputError, match='Line 1'):
        parse_config(text, 'x')
    assert parse_config(text.replace('e=float', 'e=inf'), 'x').a.c == (1, float('-inf'))


@pytest.mark.parametrize(
    'name',
    ['my{{fileDirname}}photos', 'photos_{{$HOME:x}}', "{{ $PATH:'a' }}", '{{_base_.x}}', '{{{{', "it's \\{{a}}\n"],
)
def test_braces_in_paths_are_no_variables(tmp_path, name):
    """MMEngine substitutes them when it reads a config, also where a user's folder is called so."""
    values = dict(model=dict(path=name, classes=[name, 'ant'], pair=(name,)), work_dir=f'/a/{name}', note={'a b': name})
    path = tmp_path / 'config.py'
    Config(values).dump(path)
    assert Config.fromfile(path).to_dict() == values
    assert parse_config(path.read_text(), 'x').to_dict() == values
    again = tmp_path / 'again.py'
    Config.fromfile(path).dump(again)  # as the runner does
    assert Config.fromfile(again).to_dict() == values


@pytest.fixture
def own(tiny_config, milan_cfg, tmp_path):
    """A checkpoint of the small model as MMEngine writes it, its config and the model."""
    cfg = Config.fromfile(tiny_config())
    model = MODELS.build(milan_cfg)
    model.init_weights()
    path = tmp_path / 'run' / 'epoch_1.pth'
    path.parent.mkdir()
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text)), path)
    return path, cfg, model


def test_own_checkpoint_needs_no_config_file(own, image_folder):
    path, _, model = own
    images = sorted(str(file) for file in image_folder.glob('*/*/*.jpg'))[:3]
    encoder = mmmilan.get_model(path)
    assert torch.equal(encoder.backbone.cls_token, model.backbone.cls_token)
    features = mmmilan.FeatureExtractor(path)(images)
    extract = mmmilan.FeatureExtractor(encoder)
    assert features.shape == (3, 48) and torch.equal(features, extract(images))
    whole = mmmilan.get_model(str(path), encoder_only=False)
    assert torch.equal(whole.neck.mask_token, model.neck.mask_token)


@pytest.mark.parametrize('place', ['top', 'BGR', 'of MMEngine'])
def test_the_data_preprocessor_of_a_checkpoint(own, image_folder, place):
    """mmpretrain's own configs have it at the top, from where MMEngine moves it into the model."""
    path, cfg, model = own
    image = next(image_folder.glob('*/*/*.jpg'))
    features = mmmilan.FeatureExtractor(path)(image)
    given = cfg.model.pop('data_preprocessor')
    if place == 'top':
        cfg.data_preprocessor = given
    elif place == 'BGR':
        cfg.model.data_preprocessor = {key: given[key] for key in ('type', 'mean', 'std')}
    else:
        cfg.model.data_preprocessor = dict(
            type='mmengine.ImgDataPreprocessor', mean=given.mean, std=given.std, bgr_to_rgb=True
        )
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text)), path)
    if place == 'BGR':
        image = cv2.imread(str(image))[..., ::-1].copy()
    assert torch.equal(mmmilan.FeatureExtractor(path)(image), features)


def test_a_classifier_with_its_data_preprocessor_at_the_top(benchmark_config, tmp_path):
    """It predicted from pixels that nothing had normalised."""
    config = benchmark_config('vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py', {'model.backbone.init_cfg': None})
    cfg, found = Config.fromfile(config), []
    model = MODELS.build(cfg.model)
    for _ in range(2):
        torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text)), tmp_path / 'model.pth')
        Config(cfg.to_dict()).dump(tmp_path / 'config.py')
        for built in (
            mmmilan.get_model(tmp_path / 'model.pth'),
            mmmilan.get_model(tmp_path / 'config.py', pretrained=tmp_path / 'model.pth'),
        ):
            found.append(
                mmmilan.ImageClassificationInferencer(built)(np.zeros((64, 64, 3), np.uint8))[0]['pred_scores']
            )
        if 'data_preprocessor' in cfg.model:
            cfg.data_preprocessor = cfg.model.pop('data_preprocessor')
    assert all(np.array_equal(each, found[0]) for each in found)


def test_the_config_beside_a_checkpoint(own):
    path, cfg, model = own
    content = torch.load(path, weights_only=True)
    torch.save(content['state_dict'], path)
    with pytest.raises(InputError, match='holds no config and none is beside it'):
        mmmilan.get_model(path)
    (path.parent / 'config.py').write_text(cfg.pretty_text)
    assert own_config(path).model.to_dict() == cfg.model.to_dict()
    assert torch.equal(mmmilan.get_model(path).backbone.cls_token, model.backbone.cls_token)
    (path.parent / 'other.py').write_text('')
    with pytest.raises(InputError, match='several are beside it'):
        own_config(path)


def test_evaluation_needs_only_the_checkpoint(own, run_tool, tmp_path, capfd):
    path, _, _ = own
    run_tool('test.py', path, '--work-dir', tmp_path / 'test')
    assert 'reconstruction/loss' in capfd.readouterr().err + ''.join(
        file.read_text() for file in (tmp_path / 'test').glob('*/*.json')
    )
    with pytest.raises(SystemExit, match='is a config without weights'):
        run_tool('test.py', ROOT / 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py')
