# Linear probe of the ViT-L/16 that was pretrained with uniform random masking (paper, table 8, RS).
_base_ = './vit-large-p16_8xb2048-linear-coslr-100e_in1k.py'

model = dict(
    backbone=dict(init_cfg=dict(checkpoint='milan-random-masking_vit-large-p16_16xb256-amp-coslr-400e_in1k'))
)
