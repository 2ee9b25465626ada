# Semantic aware probing of ViT-B/16: the frozen encoder sees the half of the patches to which CLIP's class token
# attends most, in training and in validation (paper, table 7, row 6).
_base_ = './vit-base-p16_8xb2048-linear-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        type='mmmilan.SemanticAwareViT',
        keep_ratio=0.5,
        teacher=dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16-quickgelu', pretrained='openai'),
    )
)
