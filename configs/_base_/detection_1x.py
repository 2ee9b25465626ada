# Detection for 12 epochs, batch 16 (paper, appendix A.1). Biases decay and norms do not, as in hustvl/MIMDet.
_base_ = './dense_adamw.py'

# float16: mmdet takes boxes in the type of the features to pool them, and bfloat16 would round 1000 to steps of 4.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(layer_decay_rate=0.75, norm_decay_mult=0.0),
)
# The paper has no warm-up; 500 steps are mmdet's.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500),
    dict(type='MultiStepLR', milestones=[8, 11], end=12, gamma=0.1),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
