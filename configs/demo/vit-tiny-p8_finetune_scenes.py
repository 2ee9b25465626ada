# Classification of the demo's drawn scenes: fine-tuning on a ninth of them.
_base_ = '../milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=128, num_layers=4, num_heads=2, feedforward_channels=512),
        img_size=64,
        patch_size=8,
        init_cfg=dict(checkpoint='demo/milan-seed0/epoch_8.pth'),
    ),
    head=dict(num_classes=10, in_channels=128),
    train_cfg=dict(augments=None),
)

load = dict(type='mmmilan.LoadImage')
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=False,
    pin_memory=False,
    drop_last=False,
    dataset=dict(
        data_root='demo/scenes',
        data_prefix='train',
        indices=list(range(0, 3000, 9)),
        pipeline=[
            load,
            dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.5, 1.0), interpolation='area'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='mmmilan.ImageFolder',
        data_root='demo/scenes',
        data_prefix='val',
        with_label=True,
        pipeline=[load, dict(type='Resize', scale=(64, 64), interpolation='area'), dict(type='PackInputs')],
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, T_max=19, end=20, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=20, val_interval=20)
default_hooks = dict(logger=dict(interval=10))
