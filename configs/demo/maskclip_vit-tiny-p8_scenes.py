# The demo's teacher: a small MaskCLIP trained on the captions of the drawn scenes.
_base_ = '../maskclip/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=128, num_layers=4, num_heads=2, feedforward_channels=512),
        img_size=64,
        patch_size=8,
    ),
    text=dict(context_length=24, width=128, heads=2, layers=2),
    embed_dim=128,
    neck=dict(num_patches=64, embed_dim=128, decoder_embed_dim=96, decoder_num_heads=4, predict_feature_dim=128),
    head=dict(feature_dim=128, num_codewords=256, warmup_steps=47),  # the first epoch
    language=dict(decoder_num_heads=2),
)
default_hooks = dict(logger=dict(interval=10), mean_teacher=dict(start=0.99, end=0.999))  # 4 epochs are 188 steps

load = dict(type='mmmilan.LoadImage')
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    persistent_workers=False,
    pin_memory=False,
    drop_last=False,
    sampler=dict(type='mmmilan.ReproducibleSampler', shuffle=True),
    dataset=dict(
        type='mmmilan.CaptionedImages',
        data_root='demo/scenes/train',
        captions='demo/scenes/captions_train.csv',
        pipeline=[
            load,
            dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.7, 1.0), interpolation='area'),
            dict(type='RandomFlip', prob=0.5),
            dict(type='mmmilan.TokenizeCaption', context_length=24),
            dict(type='PackInputs', algorithm_keys=('text',)),
        ],
    ),
)
test_dataloader = dict(
    batch_size=64,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='mmmilan.ImageFolder',
        data_root='demo/scenes/val',
        with_label=True,
        pipeline=[load, dict(type='Resize', scale=(64, 64), interpolation='area'), dict(type='PackInputs')],
    ),
)
test_evaluator = dict(topk=(1,))
test_cfg = dict(templates=['a {}'], class_names=None)

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(weight_decay=0.1))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, T_max=3, end=4, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=4)
