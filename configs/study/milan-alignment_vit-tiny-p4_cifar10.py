# MaskAlign: no decoder, the teacher's last two layers as target, at half the epochs (200 in place of 400).
_base_ = './milan_vit-tiny-p4_cifar10.py'

model = dict(
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=dict(
        _delete_=True, type='mmmilan.LayerMixture', embed_dim=96, num_layers=4, num_targets=2, predict_feature_dim=192
    ),
    head=dict(type='mmmilan.LayerAlignment', num_layers=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=130),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=130, T_max=390, end=520),
]
train_cfg = dict(max_epochs=2)
