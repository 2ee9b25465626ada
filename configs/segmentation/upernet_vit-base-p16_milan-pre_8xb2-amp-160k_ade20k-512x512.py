# UperNet on ADE20K from a MILAN ViT-B/16 (paper, table 3 and appendix A.1: mIoU 52.7), with the encoder of
# implus/mae_segmentation, on which the paper builds.
# 8 GPUs x 2 images: bash tools/dist_train.sh configs/segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py 8
_base_ = ['../_base_/ade20k_512x512.py', '../_base_/dense_adamw.py', '../_base_/default_runtime.py']
default_scope = 'mmseg'

# Where the encoder starts; see configs/milan/README.md.
pretrain = '{{$PRETRAIN:milan_vit-base-p16_16xb256-amp-coslr-400e_in1k}}'

norm_cfg = dict(type='SyncBN')
head = dict(
    num_classes=150,
    dropout_ratio=0.1,
    norm_cfg=norm_cfg,
    align_corners=False,
)
model = dict(
    _scope_='mmseg',  # for get_model, also of mmpretrain
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
        scale_norm_cfg=norm_cfg,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=pretrain),
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
    optimizer=dict(lr=3e-5, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.9, flat_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, end=1500),
    dict(type='PolyLR', power=1.0, by_epoch=False, begin=1500, end=160000),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)

log_processor = dict(by_epoch=False)
visualizer = dict(type='SegLocalVisualizer')
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=16000),
    visualization=dict(type='SegVisualizationHook'),
)
