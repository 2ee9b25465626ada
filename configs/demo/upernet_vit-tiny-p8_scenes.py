# The demo's transfer to segmentation: a narrow UperNet on the drawn scenes, 96 x 96 pixels.
_base_ = '../segmentation/upernet_milan_vit-base-p16_160k_ade20k-512x512.py'

# groups of channels: the pooled map of a single image has nothing to take the statistics of a batch from
norm_cfg = dict(_delete_=True, type='GN', num_groups=16)
head = dict(num_classes=16, norm_cfg=norm_cfg)
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=128, num_layers=4, num_heads=4, feedforward_channels=512),
        img_size=96,
        patch_size=8,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(checkpoint='demo/milan-seed0/epoch_8.pth'),
    ),
    decode_head=dict(in_channels=[128, 128, 128, 128], channels=32, **head),
    auxiliary_head=dict(in_channels=128, channels=32, **head),
    test_cfg=dict(_delete_=True, mode='whole'),
)

classes = ('bricks', 'grass', 'night', 'sand', 'sky', 'water', 'candy', 'frog', 'gingham', 'gold', 'ladybird', 'melon')
classes += ('oak', 'steel', 'taxi', 'tiger')
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root='demo/scenes',
    metainfo=dict(classes=classes),
    img_suffix='.jpg',
    seg_map_suffix='.png',
)
load = dict(type='mmmilan.LoadImage')
train_dataloader = dict(
    batch_size=16,
    sampler=dict(type='DefaultSampler'),
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='train', seg_map_path='semantic/train'),
        pipeline=[load, dict(type='LoadAnnotations'), dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')],
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
        pipeline=[load, dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
        **dataset,
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, T_max=1, end=2, convert_to_iter_based=True),
]
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=2, val_interval=2)
log_processor = dict(by_epoch=True)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1),
)
