# UperNet on ADE20K from a MILAN ViT-L/16 (paper, table 3 and appendix A.1: mIoU 57.9). Blocks are recomputed in the
# backward pass, to fit 2 images on a GPU.
# 8 GPUs x 2 images: bash tools/dist_train.sh configs/segmentation/upernet_vit-large-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py 8
_base_ = './upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py'

pretrain = '{{$PRETRAIN:milan_vit-large-p16_16xb256-amp-coslr-400e_in1k}}'

model = dict(
    backbone=dict(
        arch='large',
        out_indices=(7, 11, 15, 23),
        with_cp=True,
        init_cfg=dict(checkpoint=pretrain),
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
