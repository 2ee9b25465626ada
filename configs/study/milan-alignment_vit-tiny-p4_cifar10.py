# MaskAlign: no decoder, the teacher's last two layers as target, at half the epochs (as in its paper).
_base_ = './milan_vit-tiny-p4_cifar10.py'

model = dict(
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=dict(
        _delete_=True, type='mmmilan.LayerMixture', embed_dim=96, num_layers=4, num_targets=2, predict_feature_dim=192
    ),
    head=dict(type='mmmilan.LayerAlignment', num_layers=2),
)
train_cfg = dict(max_epochs=2)
