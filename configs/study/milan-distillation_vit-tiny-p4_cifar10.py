# Knowledge distillation: no decoder, loss on the visible patches (table 10).
_base_ = './milan_vit-tiny-p4_cifar10.py'

model = dict(neck=dict(_delete_=True, type='mmmilan.LinearProjection', embed_dim=96, predict_feature_dim=96))
