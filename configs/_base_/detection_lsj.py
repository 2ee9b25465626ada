# The long schedules of hustvl/MIMDet's benchmarking models and of arXiv 2111.11429, not of MILAN's paper: batch 64,
# warm-up for a quarter of an epoch, cosine to 0, no layer decay. Here 25 epochs.
_base_ = './detection_1x.py'

optim_wrapper = dict(optimizer=dict(lr=8e-5), paramwise_cfg=dict(layer_decay_rate=1.0))
auto_scale_lr = dict(base_batch_size=64)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=0.25, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=0.25, T_max=24.75, end=25, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=25, val_interval=5)
