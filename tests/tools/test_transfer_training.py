"""Detection and segmentation learn from real annotations, through the tools, and write their figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from helpers import ROOT, read_metrics, read_scalars, real_data
from mmmilan.registry import MODELS
from processes import run_script_on_ranks

CONFIGS = ROOT / 'configs'


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A pretraining checkpoint of the demo's size, as MMEngine's runner writes one, untrained."""
    cfg = Config.fromfile(CONFIGS / 'demo/mae_vit-tiny-p8_scenes.py')
    model = MODELS.build(cfg.model)
    model.init_weights()
    path = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return path


def small(task: str, sibling: str, num_classes: int, data_root: Path, checkpoint: Path, tmp_path: Path) -> Config:
    """A config of the paper's size with the model of its small sibling, for images of 64 pixels."""
    (base,) = [path for path in (CONFIGS / task).glob('*vit-base*') if '1x' in path.stem or '160k' in path.stem]
    cfg = Config.fromfile(base)
    sibling = Config.fromfile(CONFIGS / 'demo' / sibling)
    cfg.model, cfg.optim_wrapper = sibling.model, sibling.optim_wrapper
    cfg.model.backbone.init_cfg.checkpoint = str(checkpoint)
    for head in ('roi_head.bbox_head', 'roi_head.mask_head', 'decode_head', 'auxiliary_head'):
        if head.split('.')[0] in cfg.model:
            cfg.merge_from_dict({f'model.{head}.num_classes': num_classes})
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[name].update(num_workers=0, persistent_workers=False)
        cfg[name].dataset.data_root = str(data_root)
    cfg.train_dataloader.batch_size = 4
    cfg.param_scheduler = []
    cfg.default_hooks.logger.interval = 1
    cfg.log_processor = dict(window_size=1, by_epoch=task == 'detection')  # each step's own loss
    cfg.default_hooks.checkpoint.interval = -1
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.work_dir = str(tmp_path / 'work')
    return cfg


def train_and_test(cfg: Config, run_tool, tmp_path: Path, checkpoint: str) -> dict:
    """Run both tools; the loss must fall. Returns the metrics."""
    path = tmp_path / f'{tmp_path.name}.py'
    cfg.dump(path)
    run_tool('train.py', path)
    losses = [row['loss'] for row in read_scalars(tmp_path / 'work') if 'loss' in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    run_tool('test.py', path, tmp_path / 'work' / checkpoint)
    return read_metrics(tmp_path / 'work')


@pytest.mark.data
def test_detection_on_coco128(checkpoint, run_tool, tmp_path):
    coco128 = real_data('coco128')
    init_default_scope('mmdet')
    cfg = small('detection', 'mask-rcnn_vit-tiny-p8_scenes.py', 80, coco128, checkpoint, tmp_path)
    cfg.train_dataloader.dataset.pipeline[3].update(scale=(64, 64), ratio_range=(0.8, 1.2))
    cfg.train_dataloader.dataset.pipeline[4].crop_size = (64, 64)
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.model.test_cfg.rcnn.score_thr = 0.0  # so that there is something to evaluate after so few steps
    cfg.test_dataloader.dataset.update(indices=10)
    cfg.test_dataloader.dataset.pipeline[1].scale = (64, 64)
    cfg.test_evaluator.ann_file = str(coco128 / 'annotations/instances_val2017.json')
    figures = train_and_test(cfg, run_tool, tmp_path, 'epoch_1.pth')
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(figures)
    assert all(0 <= figures[f'coco/{kind}_mAP'] <= 1 for kind in ('bbox', 'segm'))


@pytest.mark.data
@pytest.mark.parametrize('data', ['coco128', 'ade20k_sample'])
def test_segmentation(data, checkpoint, run_tool, tmp_path):
    init_default_scope('mmseg')
    data_root = real_data(data)
    num_classes = 129 if data == 'coco128' else 150
    cfg = small('segmentation', 'upernet_vit-tiny-p8_scenes.py', num_classes, data_root, checkpoint, tmp_path)
    if data == 'coco128':
        classes = json.loads((data_root / 'semantic/classes.json').read_text())
        for name, split in (('train_dataloader', 'train2017'), ('test_dataloader', 'val2017')):
            pipeline = cfg[name].dataset.pipeline
            annotated = sorted(path.stem for path in (data_root / 'semantic' / split).iterdir())  # not all images are
            (tmp_path / split).write_text('\n'.join(annotated))
            cfg[name].dataset = dict(
                type='BaseSegDataset',
                data_root=str(data_root),
                ann_file=str(tmp_path / split),
                metainfo=dict(classes=classes),
                data_prefix=dict(img_path=split, seg_map_path=f'semantic/{split}'),
                pipeline=pipeline,
            )
    else:
        for name in ('train_dataloader', 'test_dataloader'):
            cfg[name].dataset.data_prefix = dict(img_path='images/validation', seg_map_path='annotations/validation')
    cfg.train_dataloader.dataset.pipeline[2].scale = (256, 64)
    cfg.train_dataloader.dataset.pipeline[3].crop_size = (64, 64)
    cfg.test_dataloader.dataset.pipeline[1].scale = (256, 64)
    cfg.train_dataloader.dataset.indices = 4 if data == 'coco128' else None  # a few can be learned in a few steps
    cfg.test_dataloader.dataset.indices = 3
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=20)
    figures = train_and_test(cfg, run_tool, tmp_path, 'iter_20.pth')
    assert 0 <= figures['mIoU'] <= 100 and 0 < figures['aAcc'] <= 100


@pytest.mark.slow
@pytest.mark.parametrize('sibling', ['mask-rcnn_vit-tiny-p8_scenes.py', 'upernet_vit-tiny-p8_scenes.py'])
def test_two_processes(sibling, checkpoint, scenes, tmp_path):
    """Training and evaluation on CPU: the small siblings on a few scenes."""
    cfg = Config.fromfile(CONFIGS / 'demo' / sibling)
    cfg.model.backbone.init_cfg.checkpoint = str(checkpoint)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(batch_size=5, num_workers=0)
        loader.dataset.update(data_root=str(scenes), indices=None)
    if 'ann_file' in cfg.test_evaluator:
        cfg.test_evaluator.ann_file = str(scenes / 'annotations/instances_val.json')
        cfg.model.test_cfg.rcnn.score_thr = 0.0
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = []
    cfg.work_dir = str(tmp_path / 'work')
    path = tmp_path / f'{tmp_path.name}.py'
    cfg.dump(path)
    trained = tmp_path / 'work/epoch_1.pth'
    run_script_on_ranks('train.py', 2, path)
    run_script_on_ranks('test.py', 2, path, trained)
    assert torch.load(trained, weights_only=False)['meta']['iter'] == 1  # 10 images in a batch of 2 x 5
    figures = read_metrics(tmp_path / 'work')
    assert 'coco/segm_mAP' in figures or 'mIoU' in figures


@pytest.mark.slow
@pytest.mark.slow
def test_boxes_alone(checkpoint, scenes, run_tool, tmp_path):
    """Annotations without masks train a detector of boxes, from the same config."""
    cfg = Config.fromfile(CONFIGS / 'demo/mask-rcnn_vit-tiny-p8_scenes.py')
    cfg.model.backbone.init_cfg.checkpoint = str(checkpoint)
    for name, split in dict(train_dataloader='train', test_dataloader='val').items():
        content = json.loads((scenes / f'annotations/instances_{split}.json').read_text())
        for annotation in content['annotations']:
            del annotation['segmentation']
        content['categories'].reverse()
        (tmp_path / f'{split}.json').write_text(json.dumps(content, indent=1))
        cfg[name].update(batch_size=5, num_workers=0)
        cfg[name].dataset.update(data_root=str(scenes), ann_file=str(tmp_path / f'{split}.json'), indices=None)
    cfg.test_evaluator.ann_file = str(tmp_path / 'val.json')
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = []
    cfg.work_dir = str(tmp_path / 'work')
    path = tmp_path / f'{tmp_path.name}.py'
    cfg.dump(path)
    run_tool('train.py', path)
    trained = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    assert not any('mask_head' in key for key in trained['state_dict'])
    assert 'boxes alone, no segmentation' in next((tmp_path / 'work').glob('*/*.log')).read_text()
    run_tool('test.py', path, tmp_path / 'work/epoch_1.pth')
    figures = read_metrics(tmp_path / 'work')
    assert 'coco/bbox_mAP' in figures and 'coco/segm_mAP' not in figures
