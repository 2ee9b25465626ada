"""Configs of detection and segmentation: the paper's recipes, built at their real size, on real images."""

from __future__ import annotations

import copy
import math
import re
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, PARAM_SCHEDULERS, init_default_scope
from torch import nn

from helpers import ROOT, own_settings, real_data, rest_slow, restated
from mmmilan.checkpoints.zoo import zoo_models
from mmmilan.registry import MODELS

FOLDERS = ('detection', 'segmentation')
CONFIGS = {path.stem: path for folder in FOLDERS for path in (ROOT / 'configs' / folder).glob('*.py')}
DETECTION = 'mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco'
LONG = re.compile(r'lsj-(\d+)e')  # the long schedules, in epochs
SEGMENTATION = 'upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512'
LARGE = dict(embed_dims=1024, num_layers=24, num_heads=16)
BASE = dict(embed_dims=768, num_layers=12, num_heads=12)


@cache
def parsed(path: Path) -> Config:
    """A config of a file, which takes most of a second; not to be changed."""
    return Config.fromfile(path)


def read(name: str) -> Config:
    cfg = copy.deepcopy(parsed(CONFIGS[name]))
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.mark.parametrize('name', CONFIGS)
def test_config_states_only_its_difference(name):
    own = own_settings(CONFIGS[name])
    bases = own.pop('_base_')
    for base in [bases] if isinstance(bases, str) else bases:
        assert list(restated(own, parsed(CONFIGS[name].parent / base).to_dict())) == []


@pytest.mark.parametrize(
    'name',
    rest_slow(
        [name for name in zoo_models() if '_coco' in name or '_ade20k' in name],
        DETECTION,
        SEGMENTATION,
        'mask-rcnn_vit-large-p16_milan-pre_32xb2-amp-lsj-100e_coco',
        'upernet_vit-base-p16_maskclip-pre_8xb2-amp-160k_ade20k-512x512',
    ),
)
def test_name_states_what_the_config_does(name):
    """MODEL_ENCODER_START_GPUSxbIMAGES-amp-AUGMENTATION-SCHEDULE_DATA, as in MMDetection and MMSegmentation."""
    pattern = r'[\w-]+_vit-\w+-p16_\w+-pre_(\d+)xb(\d+)-amp-(lsj-)?(1x|\d+e|\d+k)_(coco|ade20k-512x512)'
    gpus, images, jitter, schedule, data = re.fullmatch(pattern, name).groups()
    cfg = parsed(zoo_models()[name].config)
    assert cfg.train_dataloader.batch_size == int(images)
    assert cfg.auto_scale_lr.base_batch_size == int(gpus) * int(images)
    assert cfg.optim_wrapper.type in ('AmpOptimWrapper', 'mmmilan.BFloat16OptimWrapper')
    resize = next(step for step in cfg.train_dataloader.dataset.pipeline if step['type'] == 'RandomResize')
    assert (tuple(resize['ratio_range']) == (0.1, 2.0)) == bool(jitter)
    length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters // 1000
    assert length == (12 if schedule == '1x' else int(schedule[:-1]))
    assert data.partition('-')[0] in cfg.train_dataloader.dataset.type.lower()


@pytest.mark.parametrize('name', rest_slow(CONFIGS, DETECTION, SEGMENTATION))
def test_real_size(name):
    """The whole model, on a tensor of the recipe's size, without memory."""
    cfg = read(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        size = 1024 if 'coco' in name else 512
        features = model.extract_feat(torch.empty(2, 3, size, size))
        if 'coco' in name:
            assert [tuple(each.shape) for each in features] == [(2, 256, side, side) for side in (256, 128, 64, 32, 16)]
            assert len(model.rpn_head(features)[0]) == 5
            assert len(model.rpn_head.rpn_conv) == 2
            assert len(model.roi_head.bbox_head.shared_convs) == 4 and len(model.roi_head.bbox_head.shared_fcs) == 1
            assert len(model.roi_head.mask_head.convs) == 4
        else:
            assert model.decode_head(features).shape == (2, 150, 128, 128)
            assert model.auxiliary_head(features).shape == (2, 150, 32, 32)
    vit = model.backbone
    wanted = LARGE if 'large' in name else BASE
    assert {key: vit.arch_settings[key] for key in wanted} == wanted
    depth = vit.num_layers
    quarters = tuple(depth * i // 4 - 1 for i in (1, 2, 3, 4))
    windows = [layer.attn.window_size for layer in vit.layers]
    if 'coco' in name:  # windows of 16 x 16 but in four blocks, evenly spaced, after which the maps are taken
        assert windows == [0 if i in quarters else 16 for i in range(depth)] and vit.out_indices == quarters
        assert vit.cls_token is None and vit.pos_embed.shape[1] == 64 * 64
        shapes = {name: tuple(table.shape[1:]) for name, table in vit.rel_pos_shared.items()}
        assert shapes == {'windows': (31, 31), 'global': (127, 127)}
        assert isinstance(vit.scales[0][1], nn.GroupNorm) and vit.scales[0][1].num_groups == 32
        heads = (model.neck, model.roi_head.bbox_head, model.roi_head.mask_head)
        norms = [sum(isinstance(module, nn.SyncBatchNorm) for module in head.modules()) for head in heads]
        assert norms == [8, 4, 4]  # each convolution of FPN, box head and mask head
    else:
        assert windows == [0] * depth
        assert vit.out_indices == tuple(i * depth // 12 - 1 for i in (4, 6, 8, 12))
        assert all(layer.attn.rel_pos_table.shape[1:] == (63, 63) for layer in vit.layers)
        assert isinstance(vit.scales[0][1], nn.SyncBatchNorm)
    drop_path = 0.2 if 'large' in name and 'coco' in name else 0.1
    assert vit.layers[-1].attn.out_drop.drop_prob == pytest.approx(drop_path)


@pytest.mark.parametrize('name', [name for name in CONFIGS if not LONG.search(name)])
def test_schedule(name):
    """Appendix A.1."""
    cfg = read(name)
    warm_up, decay = cfg.param_scheduler
    assert cfg.auto_scale_lr.base_batch_size == 16 == 8 * cfg.train_dataloader.batch_size
    assert (warm_up.type, warm_up.by_epoch) == ('LinearLR', False)
    if 'coco' in name:
        assert (cfg.train_cfg.max_epochs, decay.end, decay.milestones, decay.gamma) == (12, 12, [8, 11], 0.1)
    else:
        assert (warm_up.end, decay.type, decay.begin, decay.by_epoch) == (1500, 'PolyLR', 1500, False)
        assert cfg.train_cfg.max_iters == decay.end == 160000


@pytest.mark.parametrize('name', [name for name in CONFIGS if LONG.search(name)])
def test_long_schedule(name):
    """hustvl/MIMDet: batch 64, rate 8e-5 without layer decay, a quarter of an epoch of warm-up, cosine to 0."""
    cfg = read(name)
    epochs, steps = int(LONG.search(name)[1]), 40
    assert cfg.train_cfg.max_epochs == epochs and cfg.auto_scale_lr.base_batch_size == 64
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == 1
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    default_args = dict(optimizer=optimizer, epoch_length=steps)
    schedulers = [PARAM_SCHEDULERS.build(each, default_args=default_args) for each in cfg.param_scheduler]
    rates = []
    for _ in range(epochs * steps):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(8e-8) and max(rates) == rates[steps // 4] == pytest.approx(8e-5)
    for epoch in range(1, epochs):  # theirs counts the cosine from the first step; a quarter of an epoch apart
        assert rates[epoch * steps] == pytest.approx(4e-5 * (1 + math.cos(math.pi * epoch / epochs)), abs=1e-6)
    assert rates[-1] < 1e-5 * 8e-5


def sample(name: str, data_root: Path, **changes) -> list[dict]:
    """The first sample of training and of evaluation, through the config's pipelines, from a folder of real data."""
    cfg = read(name)
    loaders = (cfg.train_dataloader, cfg.val_dataloader)
    for loader in loaders:
        loader.dataset.update(data_root=str(data_root), **changes)
    return [DATASETS.build(loader.dataset)[0] for loader in loaders]


@pytest.mark.data
def test_detection_data():
    train, val = sample(DETECTION, real_data('coco128'))
    height, width = train['inputs'].shape[1:]
    assert 0 < height <= 1024 and 0 < width <= 1024
    instances = train['data_samples'].gt_instances
    assert len(instances.bboxes) == len(instances.masks) == len(instances.labels) and instances.masks.height == height
    assert instances.masks.masks.any(axis=(1, 2)).all()
    assert max(val['inputs'].shape[1:]) == 1024
    preprocessor = MODELS.build(read(DETECTION).model.data_preprocessor)
    for each in (train, val):  # the padding is no part of the image, where boxes could be predicted
        batch = preprocessor(dict(inputs=[each['inputs']], data_samples=[each['data_samples']]))
        assert batch['inputs'].shape == (1, 3, 1024, 1024)
        assert batch['data_samples'][0].img_shape == tuple(each['inputs'].shape[1:])


@pytest.mark.data
def test_segmentation_data():
    folders = dict(img_path='images/validation', seg_map_path='annotations/validation')
    train, val = sample(SEGMENTATION, real_data('ade20k_sample'), data_prefix=folders)
    assert train['inputs'].shape[1:] == train['data_samples'].gt_sem_seg.shape
    assert max(train['inputs'].shape[1:]) <= 512 <= min(val['inputs'].shape[1:])
    drawn = cv2.imread(val['data_samples'].seg_map_path, cv2.IMREAD_UNCHANGED).astype(int)
    expected = np.where(drawn == 0, 255, drawn - 1)  # 0 is unlabelled, and ignored
    assert (expected == 255).any() and np.array_equal(val['data_samples'].gt_sem_seg.data[0], expected)
