# The demo: MILAN on the drawn scenes, against the demo's own MaskCLIP.
_base_ = '../milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=128, num_layers=4, num_heads=2, feedforward_channels=512),
        img_size=64,
        patch_size=8,
    ),
    neck=dict(
        num_patches=64,
        embed_dim=128,
        decoder_embed_dim=96,
        decoder_depth=2,
        decoder_num_heads=4,
        predict_feature_dim=128,
    ),
    head=dict(teacher=dict(model=None, pretrained='demo/maskclip-seed0/epoch_4.pth')),
)

load = dict(type='mmmilan.LoadImage')
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=False,  # their end takes seconds, and the demo trains three models
    pin_memory=False,
    drop_last=False,
    dataset=dict(
        data_root='demo/scenes/train',
        pipeline=[
            load,
            dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.5, 1.0), interpolation='area'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ],
    ),
)
test_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(
        data_root='demo/scenes/val',
        with_label=True,
        pipeline=[load, dict(type='Resize', scale=(64, 64), interpolation='area'), dict(type='PackInputs')],
    ),
)

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, T_max=7, end=8, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=8)
default_hooks = dict(logger=dict(interval=10))
