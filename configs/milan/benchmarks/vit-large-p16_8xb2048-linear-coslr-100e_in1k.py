# Linear probe of ViT-L/16 on ImageNet-1k (paper, appendix A.1).
_base_ = './vit-base-p16_8xb2048-linear-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        arch='large',
        frozen_stages=24,
        init_cfg=dict(checkpoint='milan_vit-large-p16_16xb256-amp-coslr-400e_in1k'),
    ),
    neck=dict(input_features=1024),
    head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=1.28))
