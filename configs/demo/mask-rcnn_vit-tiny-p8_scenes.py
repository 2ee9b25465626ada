# Detection in the demo's drawn scenes: a narrow Mask R-CNN on a ninth of them, 64 x 64 pixels.
# Norms in FPN and heads are ViTDet's, for SyncBN needs GPUs. With BN in their place box AP is higher, but the same from
# MILAN as from random weights, even if these are not trained: the heads learn such scenes alone.
_base_ = '../detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py'

strides = [2, 4, 8, 16, 32]  # of maps at 4, 2, 1 and 1/2 times the resolution of patches of 8 pixels, and FPN's last
norm_cfg = dict(type='mmpretrain.LN2d', eps=1e-6)
rois = dict(out_channels=64, featmap_strides=strides[:4])
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=128, num_layers=4, num_heads=2, feedforward_channels=512),
        img_size=64,
        patch_size=8,
        out_indices=(0, 1, 2, 3),
        window_size=4,
        global_indices=(1, 3),
        init_cfg=dict(checkpoint='demo/milan-seed0/epoch_8.pth'),
    ),
    neck=dict(in_channels=[128, 128, 128, 128], out_channels=64, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=rois,
        bbox_head=dict(in_channels=64, conv_out_channels=64, fc_out_channels=256, num_classes=10, norm_cfg=norm_cfg),
        mask_roi_extractor=rois,
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes=10, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=20)),
)

classes = ('candy', 'frog', 'gingham', 'gold', 'ladybird', 'melon', 'oak', 'steel', 'taxi', 'tiger')
load = dict(type='mmmilan.LoadImage')
resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        data_root='demo/scenes',
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=classes),
        filter_cfg=dict(min_size=8),
        indices=list(range(0, 3000, 9)),
        pipeline=[
            load,
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            resize,
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        data_root='demo/scenes',
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        metainfo=dict(classes=classes),
        pipeline=[
            load,
            resize,
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='demo/scenes/annotations/instances_val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-3), paramwise_cfg=dict(layer_decay_rate=0.6))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, T_max=7, end=8, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=8, val_interval=8)
default_hooks = dict(logger=dict(interval=10))
