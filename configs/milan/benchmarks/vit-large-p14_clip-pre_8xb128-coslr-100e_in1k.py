# CLIP itself fine-tuned on ImageNet-1k, to compare with its student (paper, table 1: 85.3): ViT-L/14, as CLIP has no ViT-L/16.
# 8 GPUs x 128 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-large-p14_clip-pre_8xb128-coslr-100e_in1k.py 8
_base_ = './vit-base-p16_clip-pre_8xb128-coslr-100e_in1k.py'

# OpenAI's file, or that of PRETRAIN: any CLIP of this size.
pretrain = '{{$PRETRAIN:https://openaipublic.azureedge.net/clip/models/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt}}'
model = dict(
    backbone=dict(arch='large', patch_size=14, drop_path_rate=0.2, init_cfg=dict(checkpoint=pretrain)),
    head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.75))
