"""Test with the mean over an image and its mirror image (test-time augmentation): ``mmmilan test --tta``."""

from __future__ import annotations

import re

from mmengine.config import Config

from mmmilan.errors import InputError

ANNOTATIONS = re.compile(r'Load\w*(Annotation|LabelMap)')
# The model that averages, by the scope of a config.
MODELS = dict(
    mmpretrain=dict(type='mmpretrain.AverageClsScoreTTA'),
    mmseg=dict(type='mmseg.SegTTAModel'),
    mmdet=dict(
        type='mmdet.models.test_time_augs.DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
)


def use_several_views(cfg: Config) -> None:
    """Test with ``tta_model`` and ``tta_pipeline`` of a config; without them, on the image and its mirror image.

    Raises:
        InputError: the library has no such model for the task.
    """
    scope = cfg.get('default_scope') or 'mmpretrain'
    if cfg.get('tta_model') is None:
        if scope not in MODELS or 'masking' in cfg.model or (cfg.model.get('head') is None and scope == 'mmpretrain'):
            raise InputError(
                f'tta averages the predictions of classes, which {cfg.model.type} has not; leave out --tta.'
            )
        if (cfg.model.get('roi_head') or {}).get('mask_head'):
            raise InputError(
                "MMDetection's DetTTAModel averages boxes and no masks; leave out --tta, or test the boxes alone "
                '(--model.roi_head.mask_head None --test_evaluator.metric bbox).'
            )
        cfg.tta_model = dict(MODELS[scope])
    dataset = cfg.test_dataloader.dataset
    if cfg.get('tta_pipeline') is None:
        *steps, pack = dataset.pipeline
        annotations = [step for step in steps if ANNOTATIONS.search(str(step.type))]
        flips = [dict(type=f'{scope}.RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        if 'meta_keys' in pack:
            pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
        views = [flips, *([step] for step in annotations), [pack]]
        steps = [step for step in steps if step not in annotations]
        cfg.tta_pipeline = [*steps, dict(type='TestTimeAug', transforms=views)]
    dataset.pipeline = cfg.tta_pipeline
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='PrepareTTAHook', tta_cfg=cfg.tta_model)]
