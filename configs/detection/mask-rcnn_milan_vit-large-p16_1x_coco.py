# ViT-L/16 (paper, appendix A.1). Blocks are recomputed in the backward pass, to fit 2 images on a GPU.
_base_ = './mask-rcnn_milan_vit-base-p16_1x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        out_indices=(5, 11, 17, 23),
        global_indices=(5, 11, 17, 23),
        drop_path_rate=0.2,
        with_cp=True,
        init_cfg=dict(checkpoint='milan_vit-large-p16_16xb256-amp-coslr-400e_in1k'),
    ),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.85))
