# Mask R-CNN on COCO from a MILAN ViT-B/16, 8 GPUs x 2 images (paper, appendix A.1; arXiv 2111.11429).
# Another start: --cfg-options model.backbone.init_cfg.checkpoint=FILE (any MILAN, MAE or supervised ViT-B/16).
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/coco_instance_lsj.py',
    '../_base_/default_runtime.py',
]
default_scope = 'mmdet'

norm_cfg = dict(type='mmpretrain.LN2d', eps=1e-6)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),  # to 1024 x 1024, in training and evaluation
    backbone=dict(
        _delete_=True,
        type='mmmilan.DenseViT',
        arch='base',
        out_indices=(2, 5, 8, 11),
        window_size=16,
        global_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='milan_vit-base-p16_16xb256-amp-coslr-400e_in1k'),
    ),
    neck=dict(in_channels=[768, 768, 768, 768], norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)

# float16: mmdet takes boxes in the type of the features to pool them, and bfloat16 would round 1000 to steps of 4.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.1, fused=True),
    constructor='mmmilan.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.75,
        flat_decay_mult=0.0,
        custom_keys={
            '.cls_token': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0),
            '.rel_pos': dict(decay_mult=0.0),
        },
    ),
)
auto_scale_lr = dict(base_batch_size=16)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500),
    dict(type='MultiStepLR', milestones=[8, 11], end=12, gamma=0.1),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
val_cfg = dict()
test_cfg = dict()

visualizer = dict(type='DetLocalVisualizer')
default_hooks = dict(visualization=dict(type='DetVisualizationHook'))
