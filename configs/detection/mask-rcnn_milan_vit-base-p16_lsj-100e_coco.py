# The longer schedule of arXiv 2111.11429: 100 epochs.
_base_ = './mask-rcnn_milan_vit-base-p16_1x_coco.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500),
    dict(type='MultiStepLR', milestones=[89, 96], end=100, gamma=0.1),
]
train_cfg = dict(max_epochs=100, val_interval=10)
