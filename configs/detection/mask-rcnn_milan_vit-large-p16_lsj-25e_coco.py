# The longer schedule of arXiv 2111.11429: 25 epochs.
_base_ = './mask-rcnn_milan_vit-large-p16_1x_coco.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500),
    dict(type='MultiStepLR', milestones=[22, 24], end=25, gamma=0.1),
]
train_cfg = dict(max_epochs=25, val_interval=5)
