# A frozen CLIP ViT-B/16 in place of the mean teacher.
_base_ = '../maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

model = dict(
    neck=dict(predict_feature_dim=512),
    head=dict(
        feature_dim=512,
        teacher=dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16-quickgelu', pretrained='openai'),
    ),
)
