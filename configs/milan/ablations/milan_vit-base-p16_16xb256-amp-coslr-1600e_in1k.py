# MILAN for 1600 epochs (paper, table 5, row 8, in brackets: 85.6 fine-tuned).
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=40, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=1560, begin=40, end=1600, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=1600)
