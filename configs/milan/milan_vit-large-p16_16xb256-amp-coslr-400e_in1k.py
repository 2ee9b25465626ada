# MILAN, ViT-L/16, CLIP ViT-L/14 target (table 9, row 2). The teacher sees 196 pixels, so its grid is 14 x 14 too.
_base_ = './milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    backbone=dict(arch='large'),
    neck=dict(embed_dim=1024, predict_feature_dim=768),
    head=dict(teacher=dict(model='ViT-L-14-quickgelu', input_size=196)),
)
