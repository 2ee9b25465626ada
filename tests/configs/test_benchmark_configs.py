"""The classification configs: each states only its difference, builds at its real size, and is the paper's recipe."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from helpers import ROOT, assert_close, check_layer_decay, own_settings, restated
from mmmilan.checkpoints.layouts import convert
from mmmilan.registry import MODELS

FOLDER = 'milan/benchmarks'
CONFIGS = {path.stem: path for path in (ROOT / 'configs' / FOLDER).glob('*.py')}
SIBLINGS = [stem for stem, path in CONFIGS.items() if isinstance(own_settings(path)['_base_'], str)]
LINEAR = [stem for stem in CONFIGS if 'linear' in stem]
SHIFTED = [stem for stem in CONFIGS if 'imagenet-' in stem]  # from other distributions than ImageNet-1k
WIDTH = dict(base=768, large=1024)


def size_of(name: str) -> str:
    return 'large' if 'large' in name else 'base'


def read(name: str) -> Config:
    cfg = Config.fromfile(CONFIGS[name])
    if 'semantic-aware' in name:
        cfg.model.backbone.teacher.pretrained = None  # random weights: nothing to download
    return cfg


def test_names():
    sizes, linear = ('base', 'large'), 'p16_8xb2048-linear-coslr-100e_in1k'
    expected = {f'vit-{size}-p16_8xb128-coslr-100e_in1k{px}' for size in sizes for px in ('', '-384px')}
    expected |= {f'{start}vit-{size}-{linear}' for size in sizes for start in ('', 'milan-random-masking_')}
    expected |= {f'vit-{size}-p16_imagenet-{kind}' for size in sizes for kind in ('a', 'r', 'sketch')}
    expected |= {f'vit-{size}-p16_knn_in1k' for size in sizes}
    expected |= {'vit-base-p16_8xb2048-semantic-aware-linear-coslr-100e_in1k', 'vit-base-p16_custom'}
    assert set(CONFIGS) == expected
    assert set(SIBLINGS) == expected - {'vit-base-p16_8xb128-coslr-100e_in1k'}


@pytest.mark.parametrize('name', sorted(set(SIBLINGS) - {'vit-base-p16_custom'}))  # whose defaults are as good as any
def test_sibling_states_only_its_difference(name):
    own = own_settings(CONFIGS[name])
    base = Config.fromfile(CONFIGS[name].parent / own.pop('_base_'))
    assert list(restated(own, base.to_dict())) == []


@pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')
@pytest.mark.parametrize('name', CONFIGS)
def test_real_size(name, on_meta):  # noqa: F811
    """The whole model, on a tensor of the recipe's size, without memory."""
    cfg = read(name)
    model = MODELS.build(cfg.model)
    width, pixels = WIDTH[size_of(name)], 384 if name.endswith('384px') else 224
    assert cfg.test_dataloader.dataset.pipeline[-2].crop_size == pixels
    assert cfg.train_dataloader.dataset.pipeline[1].scale == pixels
    images = torch.empty(2, 3, pixels, pixels)
    assert model.extract_feat(images)[-1].shape == (2, width)
    if 'knn' not in name:
        assert model(images).shape == (2, 10 if 'custom' in name else 1000)
    encoder = sum(p.numel() for key, p in model.backbone.named_parameters() if re.match('layers|patch|cls', key))
    assert encoder == (303_097_856 if width == 1024 else 85_645_824)
    assert model.backbone.pos_embed.shape == (1, 1 + (pixels // 16) ** 2, width)
    if 'semantic-aware' in name:
        assert model.backbone.num_visible == 98


@pytest.mark.parametrize(
    ('name', 'blocks', 'decay', 'drop_path'),
    [
        ('vit-base-p16_8xb128-coslr-100e_in1k', 12, 0.65, 0.1),
        ('vit-base-p16_8xb128-coslr-100e_in1k-384px', 12, 0.65, 0.1),
        ('vit-large-p16_8xb128-coslr-100e_in1k', 24, 0.75, 0.2),
        ('vit-large-p16_8xb128-coslr-100e_in1k-384px', 24, 0.75, 0.2),
    ],
)
def test_fine_tuning_recipe(name, blocks, decay, drop_path):
    """Appendix A.1; the learning rate of every parameter against the formula."""
    check_layer_decay(f'{FOLDER}/{name}.py', blocks, decay, 1e-4 * 1024 / 256, 0.05)
    cfg = read(name)
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 1024
    assert cfg.model.backbone.init_cfg.checkpoint == f'milan_vit-{size_of(name)}-p16_16xb256-amp-coslr-400e_in1k'
    augmentations = [step['type'] for step in cfg.train_dataloader.dataset.pipeline]
    assert augmentations[1:5] == ['RandomResizedCrop', 'RandomFlip', 'RandAugment', 'RandomErasing']
    resize, crop = cfg.val_dataloader.dataset.pipeline[1:3]
    assert (resize.scale, crop.crop_size) == ((384, 384) if '384' in name else (256, 224))
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline


@pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')
@pytest.mark.parametrize('name', LINEAR)
def test_linear_probe_recipe(name, on_meta):  # noqa: F811
    """Appendix A.1: LARS on the linear layer alone, the rest frozen, no augmentation but crop and flip."""
    cfg = read(name)
    size = size_of(name)
    start = 'milan-random-masking' if 'random' in name else 'milan'
    assert cfg.model.backbone.init_cfg.checkpoint == f'{start}_vit-{size}-p16_16xb256-amp-coslr-400e_in1k'
    model = MODELS.build(cfg.model)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {'head.layers.head.weight', 'head.layers.head.bias'}
    cfg.optim_wrapper.type = 'OptimWrapper'
    for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups:
        assert group['lr'] == (1.28 if size == 'large' else 3.2)
        assert (group['momentum'], group['weight_decay']) == (0.9, 0)
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 16384
    assert [step['type'] for step in cfg.train_dataloader.dataset.pipeline[1:-1]] == ['RandomResizedCrop', 'RandomFlip']
    assert cfg.model.train_cfg.augments is None and cfg.model.backbone.drop_path_rate == 0


@pytest.mark.parametrize('name', SHIFTED)
def test_other_distributions(name):
    cfg = read(name)
    fine_tuned = read(f'vit-{size_of(name)}-p16_8xb128-coslr-100e_in1k')
    for key in ('arch', 'img_size', 'out_type', 'final_norm'):
        assert cfg.model.backbone[key] == fine_tuned.model.backbone[key]
    assert cfg.model.head == fine_tuned.model.head  # so the fine-tuned checkpoint fits
    dataset = cfg.test_dataloader.dataset
    assert (dataset.type, dataset.data_root) == ('mmmilan.ImageFolder', f'data/{name.partition("p16_")[2]}')
    assert dataset.with_label and dataset.pipeline == fine_tuned.test_dataloader.dataset.pipeline
    assert cfg.test_evaluator.type == 'mmmilan.ImageNetSubsetAccuracy' and cfg.test_evaluator.topk == (1, 5)
    assert cfg.train_dataloader == fine_tuned.train_dataloader


@pytest.mark.parametrize('classes', [3, 10])
def test_own_classes(monkeypatch, classes):
    """There is no top-5 of three classes."""
    monkeypatch.setenv('CLASSES', str(classes))
    cfg = read('vit-base-p16_custom')
    assert cfg.val_evaluator.topk == cfg.test_evaluator.topk == (1, min(5, classes))
    assert cfg.model.head.num_classes == classes


@pytest.mark.usefixtures('safe_mmengine')
@pytest.mark.parametrize('layout', ['official', 'timm', 'huggingface', 'openmmlab'])
@pytest.mark.parametrize('name', [name for name in CONFIGS if '384px' in name])
def test_published_layouts_at_384(name, layout, milan_cfg, tmp_path):
    """Weights of pretraining at 224 pixels, in whatever layout, arrive whole, positions interpolated."""
    milan_cfg['backbone'].update(img_size=224)
    milan_cfg['neck'].update(num_patches=196)
    milan_cfg['head']['teacher'].update(input_size=224)
    pretrained = {key: torch.randn_like(value) for key, value in MODELS.build(milan_cfg).state_dict().items()}
    weights = pretrained | {'target_generator.visual.proj': torch.zeros(2, 2)}
    if layout != 'openmmlab':
        weights = convert(pretrained, to=layout, encoder_only=layout != 'official')
    torch.save(dict(model=weights), tmp_path / 'published.pth')

    backbone = read(name).model.backbone
    backbone.update(arch=milan_cfg['backbone']['arch'])
    backbone.init_cfg.checkpoint = str(tmp_path / 'published.pth')
    model = MODELS.build(backbone)
    model.init_weights()
    loaded = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    positions, stored = loaded.pop('backbone.pos_embed'), pretrained.pop('backbone.pos_embed')
    assert {key for key in loaded if key not in pretrained} == {'backbone.ln2.weight', 'backbone.ln2.bias'}
    encoder = {key for key in pretrained if key.startswith('backbone.')}
    assert encoder - loaded.keys() == {'backbone.ln1.weight', 'backbone.ln1.bias'}
    assert all(torch.equal(loaded[key], pretrained[key]) for key in encoder & loaded.keys())
    grid = stored[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(24, 24), mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(positions[:, :1], stored[:, :1])
    torch.testing.assert_close(positions[:, 1:], expected)
