# Linear probe of a MILAN ViT-B/16 on ImageNet-1k (paper, table 8 and appendix A.1: 78.9, and OpenMMLab's run too): frozen
# encoder, class token, BatchNorm without affine.
# 8 GPUs x 2048 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-base-p16_milan-pre_8xb2048-linear-coslr-100e_in1k.py 8
_base_ = './vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'

model = dict(
    backbone=dict(frozen_stages=12, drop_path_rate=0.0, out_type='cls_token', final_norm=True),
    neck=dict(type='mmpretrain.ClsBatchNormNeck', input_features=768),
    head=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformerClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='mmpretrain.CrossEntropyLoss'),
        init_cfg=[dict(type='TruncNormal', layer='Linear', std=0.01)],
    ),
    train_cfg=dict(augments=None),
)

train_dataloader = dict(
    batch_size=2048,
    dataset=dict(
        pipeline=[
            dict(type='mmmilan.LoadRandomResizedCrop', scale=224, flip_prob=0.5),
            dict(type='PackInputs'),
        ]
    ),
)

optim_wrapper = dict(
    _delete_=True,
    type='mmmilan.BFloat16OptimWrapper',
    optimizer=dict(type='mmmilan.LARS', lr=3.2, momentum=0.9, weight_decay=0.0),
    paramwise_cfg=dict(custom_keys={'head.layers.head.bias': dict(lars_exclude=True)}),  # as in MAE's LARS
)
auto_scale_lr = dict(base_batch_size=16384)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=90, begin=10, end=100, convert_to_iter_based=True),
]
