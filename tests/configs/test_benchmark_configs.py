"""The classification configs: each states only its difference, builds at its real size, and is the paper's recipe."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmpretrain.structures import DataSample
from torch import nn

from helpers import ROOT, check_layer_decay, own_settings, rest_slow, restated
from mmmilan.checkpoints.layouts import convert
from mmmilan.registry import MODELS

FOLDER = 'milan/benchmarks'
CONFIGS = {path.stem: path for path in (ROOT / 'configs' / FOLDER).glob('*.py')}
SIBLINGS = [stem for stem, path in CONFIGS.items() if isinstance(own_settings(path)['_base_'], str)]
LINEAR = [stem for stem in CONFIGS if 'linear' in stem]  # the paper's recipe
SHIFTED = [stem for stem in CONFIGS if 'imagenet-' in stem]  # from other distributions than ImageNet-1k
WIDTH = dict(base=768, large=1024)
FINE_TUNING = 'vit-base-p16_milan-pre_8xb128-coslr-100e_in1k'
PROBING = 'vit-base-p16_milan-pre_8xb2048-semantic-aware-linear-coslr-100e_in1k'


def size_of(name: str) -> str:
    return 'large' if 'large' in name else 'base'


def read(name: str) -> Config:
    cfg = Config.fromfile(CONFIGS[name])
    if 'semantic-aware' in name:
        cfg.model.backbone.teacher.pretrained = None  # random weights: nothing to download
    return cfg


@pytest.mark.parametrize('name', SIBLINGS)
def test_sibling_states_only_its_difference(name):
    own = own_settings(CONFIGS[name])
    base = Config.fromfile(CONFIGS[name].parent / own.pop('_base_'))
    assert list(restated(own, base.to_dict())) == []


@pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')
@pytest.mark.parametrize('name', rest_slow(CONFIGS, FINE_TUNING))
def test_real_size(name, on_meta):
    """The whole model, on a tensor of the recipe's size, without memory."""
    cfg = read(name)
    model = MODELS.build(cfg.model)
    width, pixels = WIDTH[size_of(name)], 384 if name.endswith('384px') else 224
    assert cfg.test_dataloader.dataset.pipeline[-2].crop_size == pixels
    assert cfg.train_dataloader.dataset.pipeline[0].scale == pixels
    images = torch.empty(2, 3, pixels, pixels)
    assert model.extract_feat(images)[-1].shape == (2, width)
    if 'knn' not in name:
        assert model(images).shape == (2, 1000)
    if '-pre_' in name:  # a step, but for the update
        samples = [DataSample().set_gt_label(0).set_gt_score(torch.zeros(1000)) for _ in images]
        model.loss(images, samples)['loss'].backward()
        assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
    encoder = sum(p.numel() for key, p in model.backbone.named_parameters() if re.match('layers|patch|cls', key))
    side = 14 if 'p14' in name else 16
    patches = width * 3 * (side**2 - 16**2) - width * ('_clip-pre' in name)  # no bias in CLIP's patch embedding
    assert encoder == (303_097_856 if width == 1024 else 85_645_824) + patches
    assert model.backbone.pos_embed.shape == (1, 1 + (pixels // side) ** 2, width)


@pytest.mark.parametrize(
    ('name', 'blocks', 'decay', 'drop_path'),
    [
        (FINE_TUNING, 12, 0.65, 0.1),
        pytest.param('vit-base-p16_milan-pre_8xb128-coslr-100e_in1k-384px', 12, 0.65, 0.1, marks=pytest.mark.slow),
        pytest.param('vit-large-p16_milan-pre_8xb128-coslr-100e_in1k', 24, 0.75, 0.2, marks=pytest.mark.slow),
        pytest.param('vit-large-p14_clip-pre_8xb128-coslr-100e_in1k', 24, 0.75, 0.2, marks=pytest.mark.slow),
        ('vit-large-p16_milan-pre_8xb128-coslr-100e_in1k-384px', 24, 0.75, 0.2),
    ],
)
def test_fine_tuning_recipe(name, blocks, decay, drop_path):
    """Appendix A.1; every parameter has the learning rate of the formula."""
    check_layer_decay(f'{FOLDER}/{name}.py', blocks, decay, 1e-4 * 1024 / 256, 0.05)
    cfg = read(name)
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 1024
    if '_clip-pre' not in name:
        assert cfg.model.backbone.init_cfg.checkpoint == f'milan_vit-{size_of(name)}-p16_16xb256-amp-coslr-400e_in1k'
    augmentations = [step['type'] for step in cfg.train_dataloader.dataset.pipeline]
    assert augmentations[:3] == ['mmmilan.LoadRandomResizedCrop', 'RandAugment', 'RandomErasing']
    assert cfg.train_dataloader.dataset.pipeline[0].flip_prob == 0.5
    resize, crop = cfg.val_dataloader.dataset.pipeline[1:3]
    assert (resize.scale, crop.crop_size) == ((384, 384) if '384' in name else (256, 224))
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline


@pytest.mark.parametrize(('name', 'scaled'), [(FINE_TUNING, True), (f'{FINE_TUNING}-openmmlab', False)])
def test_fine_tuning_rate(name, scaled):
    """The published code's (MAE's lr_sched): 1e-6 at the end, times the layer's decay; OpenMMLab's: 1e-6 in all."""
    rate, decays, steps = 4e-4, (1.0, 0.65**13), 10
    parameters = [nn.Parameter(torch.zeros(1)) for _ in decays]
    optimizer = torch.optim.SGD(
        [dict(params=[p], lr=rate * decay) for p, decay in zip(parameters, decays, strict=True)], lr=rate
    )
    cfg = read(name).param_scheduler
    schedulers = [
        PARAM_SCHEDULERS.build(each, default_args=dict(optimizer=optimizer, epoch_length=steps)) for each in cfg
    ]
    for step in range(100 * steps):
        if step >= 5 * steps:
            cosine = (1 + math.cos(math.pi * (step / steps - 5) / 95)) / 2
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                end = 1e-6 * (decay if scaled else 1)
                assert group['lr'] == pytest.approx(end + (rate * decay - end) * cosine, rel=1e-6)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def test_head_starts_as_in_the_published_code():
    """Standard deviation 0.02; MAE's is 2e-5."""
    head = MODELS.build(read(FINE_TUNING).model.head)
    head.init_weights()
    assert head.fc.weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_patches_of_semantic_aware_probing(on_meta):
    """The paper's half in the config, the published code's 137 of 196 by default."""
    backbone = read(PROBING).model.backbone
    assert MODELS.build(backbone).num_visible == 98
    del backbone.keep_ratio
    assert MODELS.build(backbone).num_visible == 137


@pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')
@pytest.mark.parametrize('name', LINEAR)
def test_linear_probe_recipe(name, on_meta):
    """Appendix A.1: LARS on the linear layer alone, the rest frozen, no augmentation but crop and flip."""
    cfg = read(name)
    size = size_of(name)
    if '_clip-pre' not in name:
        assert cfg.model.backbone.init_cfg.checkpoint == f'milan_vit-{size}-p16_16xb256-amp-coslr-400e_in1k'
    model = MODELS.build(cfg.model)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {'head.layers.head.weight', 'head.layers.head.bias'}
    cfg.optim_wrapper.type = 'OptimWrapper'
    for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups:
        assert group['lr'] == (1.28 if size == 'large' else 3.2)
        assert (group['momentum'], group['weight_decay']) == (0.9, 0)
        (parameter,) = group['params']
        assert group.get('lars_exclude', False) == (parameter.ndim == 1)  # as in MAE's LARS
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 16384
    crop_and_flip = dict(type='mmmilan.LoadRandomResizedCrop', scale=224, flip_prob=0.5)
    assert cfg.train_dataloader.dataset.pipeline == [crop_and_flip, dict(type='PackInputs')]
    assert cfg.model.train_cfg.augments is None and cfg.model.backbone.drop_path_rate == 0


@pytest.mark.parametrize('name', SHIFTED)
def test_other_distributions(name):
    cfg = read(name)
    fine_tuned = read(FINE_TUNING.replace('base', size_of(name)))
    for key in ('arch', 'img_size', 'out_type', 'final_norm'):
        assert cfg.model.backbone[key] == fine_tuned.model.backbone[key]
    assert cfg.model.head == fine_tuned.model.head  # so the fine-tuned checkpoint fits
    dataset = cfg.test_dataloader.dataset
    assert (dataset.type, dataset.data_root) == ('mmmilan.ImageFolder', f'data/{name.partition("p16_")[2]}')
    assert dataset.with_label and dataset.pipeline == fine_tuned.test_dataloader.dataset.pipeline
    assert cfg.test_evaluator.type == 'mmmilan.ImageNetSubsetAccuracy' and cfg.test_evaluator.topk == (1, 5)
    assert cfg.train_dataloader == fine_tuned.train_dataloader


@pytest.mark.usefixtures('safe_mmengine')
@pytest.mark.parametrize(
    'layout', rest_slow(['official', 'timm', 'huggingface', 'openmmlab'], 'official', 'timm', 'huggingface')
)
@pytest.mark.parametrize('name', rest_slow([name for name in CONFIGS if '384px' in name], f'{FINE_TUNING}-384px'))
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
