# The demo's teacher: a small CLIP trained on the captions of the drawn scenes.
_base_ = '../_base_/default_runtime.py'

model = dict(
    type='mmmilan.CLIP',
    embed_dim=128,
    vision_cfg=dict(image_size=64, patch_size=8, width=128, layers=4, head_width=64),
    text_cfg=dict(context_length=24, width=128, heads=2, layers=2),
    data_preprocessor=dict(
        type='mmpretrain.SelfSupDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),
)

train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    sampler=dict(type='mmmilan.ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmmilan.CaptionedImages',
        data_root='demo/scenes/train',
        captions='demo/scenes/captions_train.csv',
        pipeline=[
            dict(type='mmmilan.LoadImage'),
            dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.7, 1.0), interpolation='area'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='mmmilan.TokenizeCaption', context_length=24),
            dict(type='PackInputs', algorithm_keys=('text',)),
        ],
    ),
)

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={'logit_scale': dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, T_max=4, end=5, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=5)
default_hooks = dict(logger=dict(interval=10))
