# Linear probe of a MILAN ViT-L/16 on ImageNet-1k (paper, table 8 and appendix A.1: 84.1; table 9 says 84.3 of the same
# experiment).
# 8 GPUs x 2048 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-large-p16_milan-pre_8xb2048-linear-coslr-100e_in1k.py 8
_base_ = './vit-base-p16_milan-pre_8xb2048-linear-coslr-100e_in1k.py'

pretrain = '{{$PRETRAIN:milan_vit-large-p16_16xb256-amp-coslr-400e_in1k}}'

model = dict(
    backbone=dict(arch='large', frozen_stages=24, init_cfg=dict(checkpoint=pretrain)),
    neck=dict(input_features=1024),
    head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=1.28))
