# DINO ViT-B/16 as the teacher: a target without language. The published code has it, the paper no figure.
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(predict_feature_dim=768),
    head=dict(
        teacher=dict(_delete_=True, type='mmmilan.TimmTeacher', model='vit_base_patch16_224.dino'),
    ),
)
