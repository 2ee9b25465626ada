# UperNet on ADE20K from a MILAN ViT-B/16, 8 GPUs x 2 images (paper, appendix A.1; MAE's segmentation).
# Another start: --cfg-options model.backbone.init_cfg.checkpoint=FILE (any MILAN, MAE or supervised ViT-B/16).
_base_ = ['../_base_/ade20k_512x512.py', '../_base_/default_runtime.py']
default_scope = 'mmseg'

norm_cfg = dict(type='SyncBN')
head = dict(
    num_classes=150,
    dropout_ratio=0.1,
    norm_cfg=norm_cfg,
    align_corners=False,
)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='mmmilan.DenseViT',
        arch='base',
        img_size=512,
        out_indices=(3, 5, 7, 11),
        rel_pos_bias=True,
        layer_scale_init_value=1.0,  # which leaves the pretrained features as they are
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='milan_vit-base-p16_16xb256-amp-coslr-400e_in1k'),
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[768, 768, 768, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
        **head,
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4),
        **head,
    ),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)

optim_wrapper = dict(
    type='mmmilan.BFloat16OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-5, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    constructor='mmmilan.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.9,
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
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, end=1500),
    dict(type='PolyLR', power=1.0, by_epoch=False, begin=1500, end=160000),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict()
test_cfg = dict()

log_processor = dict(by_epoch=False)
visualizer = dict(type='SegLocalVisualizer')
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=16000),
    visualization=dict(type='SegVisualizationHook'),
)
