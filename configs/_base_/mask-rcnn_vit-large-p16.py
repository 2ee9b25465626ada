# The same with ViT-L/16. Blocks are recomputed in the backward pass, to fit 2 images on a GPU.
_base_ = './mask-rcnn_vit-base-p16.py'

pretrain = '{{$PRETRAIN:milan_vit-large-p16_16xb256-amp-coslr-400e_in1k}}'

model = dict(
    backbone=dict(
        arch='large',
        out_indices=(5, 11, 17, 23),
        global_indices=(5, 11, 17, 23),
        drop_path_rate=0.2,
        with_cp=True,
        init_cfg=dict(checkpoint=pretrain),
    ),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]),
)
