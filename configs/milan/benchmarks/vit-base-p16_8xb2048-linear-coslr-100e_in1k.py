# Linear probe of ViT-B/16 on ImageNet-1k: frozen encoder, class token, BatchNorm without affine (paper, appendix A.2).
_base_ = './vit-base-p16_8xb128-coslr-100e_in1k.py'

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
)
