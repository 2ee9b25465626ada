# Knowledge distillation: no decoder, loss on the visible patches (paper, table 10: 84.0 fine-tuned).
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(_delete_=True, type='mmmilan.LinearProjection', embed_dim=768, predict_feature_dim=512),
)
