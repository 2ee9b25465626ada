# CLIP ViT-B/16 as the teacher of ViT-L/16 (paper, table 9, row 1: 86.7 fine-tuned).
_base_ = '../milan_vit-large-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(predict_feature_dim=512),
    head=dict(teacher=dict(model='ViT-B-16-quickgelu', input_size=224)),
)
