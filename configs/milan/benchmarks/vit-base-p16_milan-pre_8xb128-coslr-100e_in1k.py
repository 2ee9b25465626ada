# Fine-tuning of a MILAN ViT-B/16 on ImageNet-1k (paper, table 1 and appendix A.1: 85.4): mean of the patch tokens,
# all layers trained. The head starts at std 0.02 and the rate ends at 1e-6, as in the published code; the paper says 0.
# 8 GPUs x 128 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py 8
_base_ = ['../../_base_/imagenet_finetune.py', '../../_base_/default_runtime.py']

# Where the encoder starts: the name of a pretraining config whose run is in work_dirs, or a checkpoint; see ../README.md.
pretrain = '{{$PRETRAIN:milan_vit-base-p16_16xb256-amp-coslr-400e_in1k}}'

model = dict(
    type='mmpretrain.ImageClassifier',
    data_preprocessor=dict(
        type='mmmilan.ClassificationDataPreprocessor',
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch='base',
        img_size=224,
        patch_size=16,
        drop_path_rate=0.1,
        out_type='avg_featmap',
        final_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint=pretrain),
    ),
    head=dict(
        type='mmpretrain.LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=[dict(type='TruncNormal', layer='Linear', std=0.02)],
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

# The learning rate 1e-4 x 1024 / 256 is for a batch of 1024.
optim_wrapper = dict(
    type='mmmilan.BFloat16OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    constructor='mmmilan.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.65,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'.cls_token': dict(decay_mult=0.0), '.pos_embed': dict(decay_mult=0.0)},
    ),
)
auto_scale_lr = dict(base_batch_size=1024)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=95, begin=5, end=100, eta_min_ratio=1e-6 / 4e-4, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100)
val_cfg = dict()
test_cfg = dict()
