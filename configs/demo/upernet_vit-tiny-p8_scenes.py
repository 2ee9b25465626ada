# Segmentation of the demo's drawn scenes: a narrow UperNet on a ninth of them, 64 x 64 pixels.
_base_ = '../segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py'

norm_cfg = dict(type='BN')  # SyncBN needs GPUs
head = dict(num_classes=16, norm_cfg=norm_cfg)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=128, num_layers=4, num_heads=2, feedforward_channels=512),
        img_size=64,
        patch_size=8,
        out_indices=(0, 1, 2, 3),
        scale_norm_cfg=norm_cfg,
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
labels = dict(type='mmmilan.LoadLabelMap', num_classes=len(classes))
resize = dict(type='Resize', scale=(64, 64))
flip = dict(type='RandomFlip', prob=0.5)
train_dataloader = dict(
    batch_size=8,
    drop_last=True,  # a single image, pooled to one pixel, has no statistics
    sampler=dict(type='DefaultSampler', shuffle=True),
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='train', seg_map_path='semantic/train'),
        indices=list(range(0, 3000, 9)),
        pipeline=[load, labels, resize, flip, dict(type='PackSegInputs')],
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=False,
    dataset=dict(
        data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
        pipeline=[load, resize, labels, dict(type='PackSegInputs')],
        **dataset,
    ),
)
test_dataloader = val_dataloader

# fast where the heads are, slow where the encoder knows something already
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(lr=5e-3), paramwise_cfg=dict(layer_decay_rate=0.6))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, T_max=19, end=20, convert_to_iter_based=True),
]
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=20, val_interval=20)
log_processor = dict(by_epoch=True)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1),
)
