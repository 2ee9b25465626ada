# CLIP itself probed on ImageNet-1k, to compare with its student, by MILAN's recipe (paper, table 2: 66.5).
# 8 GPUs x 2048 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-base-p16_clip-pre_8xb2048-linear-coslr-100e_in1k.py 8
_base_ = './vit-base-p16_milan-pre_8xb2048-linear-coslr-100e_in1k.py'

# OpenAI's file, or that of PRETRAIN: any CLIP of this size.
pretrain = '{{$PRETRAIN:https://openaipublic.azureedge.net/clip/models/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt}}'
model = dict(
    data_preprocessor=dict(
        mean=[122.7709383, 116.7460125, 104.09373615], std=[68.5005327, 66.6321579, 70.32316305]  # 255 times CLIP's
    ),
    backbone=dict(
        pre_norm=True,
        norm_cfg=dict(type='LN', eps=1e-5),
        layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU')),
        init_cfg=dict(checkpoint=pretrain),
    ),
)
