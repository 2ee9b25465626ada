# ViT-L/16 (paper, appendix A.1). Blocks are recomputed in the backward pass, to fit 2 images on a GPU.
_base_ = './upernet_milan_vit-base-p16_160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='large',
        out_indices=(7, 11, 15, 23),
        with_cp=True,
        init_cfg=dict(checkpoint='milan_vit-large-p16_16xb256-amp-coslr-400e_in1k'),
    ),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
