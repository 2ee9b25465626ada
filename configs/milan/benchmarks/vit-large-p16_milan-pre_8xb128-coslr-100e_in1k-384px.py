# Fine-tuning of a MILAN ViT-L/16 on ImageNet-1k at 384 pixels (paper, table 1 and appendix A.1: 88.3).
# 8 GPUs x 128 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-large-p16_milan-pre_8xb128-coslr-100e_in1k-384px.py 8
_base_ = './vit-base-p16_milan-pre_8xb128-coslr-100e_in1k-384px.py'

pretrain = '{{$PRETRAIN:milan_vit-large-p16_16xb256-amp-coslr-400e_in1k}}'

model = dict(
    backbone=dict(arch='large', drop_path_rate=0.2, init_cfg=dict(checkpoint=pretrain)),
    head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.75))
