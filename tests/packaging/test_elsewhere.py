"""Our encoder in configs of mmdet and mmseg, trained by their own tools."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmmilan.checkpoints.layouts import convert
from mmmilan.registry import MODELS

pytestmark = pytest.mark.slow

BACKBONE = """
backbone = dict(
    type='mmmilan.DenseViT',
    arch=dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192),
    img_size=64,
    out_indices=(0, 0, 1, 1),
    init_cfg=dict(type='Pretrained', checkpoint={checkpoint!r}),
)
"""
# The learning rate is 0, so that the weights after the step are those before it.
RUN = """
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False))
work_dir = {work_dir!r}
"""
CONFIGS = {
    'mmdet': """
default_scope = 'mmdet'
model = dict(
    type='RPN',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[124] * 3, std=[58] * 3),
    backbone=backbone,
    neck=None,
    test_cfg=dict(rpn=dict()),
    rpn_head=dict(
        type='RPNHead',
        in_channels=48,
        feat_channels=8,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4),
    ),
    train_cfg=dict(rpn=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, ignore_iof_thr=-1),
        sampler=dict(type='RandomSampler', num=8, pos_fraction=0.5, add_gt_as_proposals=False),
        allowed_border=-1,
        pos_weight=-1,
    )),
)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64)),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root={scenes!r},
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=('candy', 'frog', 'gingham', 'gold', 'ladybird', 'melon', 'oak', 'steel', 'taxi')),
        pipeline=pipeline,
    ),
)
""",
    'mmseg': """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[124] * 3, std=[58] * 3, size=(64, 64)),
    backbone=backbone,
    decode_head=dict(
        type='FCNHead', in_channels=48, channels=8, num_classes=16, num_convs=1, in_index=2, norm_cfg=dict(type='BN')
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root={scenes!r},
        data_prefix=dict(img_path='train', seg_map_path='semantic/train'),
        metainfo=dict(classes=tuple('abcdefghijklmnop')),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='Resize', scale=(64, 64)),
            dict(type='PackSegInputs'),
        ],
    ),
)
""",
}
# Runs their tools/train.py on one config after another and prints each error.
TRAIN = """
import runpy, sys
tool, *configs = sys.argv[1:]
for config in configs:
    sys.argv = [tool, config]
    try:
        runpy.run_path(tool, run_name='__main__')
    except Exception as error:
        print(f'{config}: {type(error).__name__}: {error}')
"""


@pytest.mark.parametrize('project', CONFIGS)
def test_weights_are_loaded_whole_or_not_at_all(project, scenes, milan_cfg, tmp_path):
    pytest.importorskip(project)
    weights = MODELS.build(milan_cfg).state_dict()
    weights = {key: torch.randn_like(value) for key, value in weights.items()}
    torch.save(dict(model=convert(weights, to='official')), tmp_path / 'published.pth')
    milan_cfg['backbone']['arch']['num_layers'] = 3
    torch.save(dict(state_dict=MODELS.build(milan_cfg).state_dict()), tmp_path / 'deeper.pth')
    checkpoints = dict(
        good='published.pth', deep='deeper.pth', zoo='milan_vit-large-p16_16xb256-amp-coslr-400e_in1k', none='no.pth'
    )
    for name, checkpoint in checkpoints.items():
        checkpoint = str(tmp_path / checkpoint) if checkpoint.endswith('.pth') else checkpoint
        text = BACKBONE + CONFIGS[project] + RUN
        for key, value in dict(checkpoint=checkpoint, scenes=str(scenes), work_dir=str(tmp_path / name)).items():
            text = text.replace(f'{{{key}!r}}', repr(value))
        (tmp_path / f'{name}.py').write_text(text)

    tool = Path(importlib.util.find_spec(project).origin).parent / '.mim/tools/train.py'
    environment = {key: value for key, value in os.environ.items() if key != 'LOCAL_RANK'}
    command = [sys.executable, '-c', TRAIN, tool, *(f'{name}.py' for name in checkpoints)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert 'good.py: ' not in run.stdout and run.returncode == 0, run.stdout + run.stderr

    trained = torch.load(tmp_path / 'good/iter_1.pth', weights_only=False)['state_dict']
    for key, value in weights.items():
        if key.startswith('backbone.') and 'backbone.ln1' not in key:  # DenseViT has no final norm
            assert torch.equal(trained[key], value), key
    errors = dict(line.split(': ', 1) for line in run.stdout.splitlines() if line.startswith(tuple(checkpoints)))
    assert errors.keys() == {'deep.py', 'zoo.py', 'none.py'}, run.stdout
    assert 'deeper.pth does not hold all of DenseViT: missing none, left over layers.2.' in errors['deep.py']
    assert errors['zoo.py'].startswith('InputError: No weights of milan_vit-large')
    assert errors['none.py'].startswith('InputError: ') and 'no.pth is neither a file nor a URL' in errors['none.py']
    assert not list(tmp_path.glob('deep/*.pth'))
