# The study's teacher: a small CLIP on one half of CIFAR-10's training images, captions from templates over class names.
_base_ = '../demo/maskclip_vit-tiny-p8_scenes.py'

model = dict(
    backbone=dict(
        arch=dict(embed_dims=96, num_layers=4, num_heads=3, feedforward_channels=384),
        img_size=32,
        patch_size=4,
    ),
    text=dict(context_length=16, width=64, heads=2, layers=1),
    embed_dim=96,
    neck=None,
    head=None,
    language=None,
    distillation_weight=0,
    language_weight=0,
)
custom_hooks = [
    dict(type='mmmilan.StepSeedHook'),
    dict(type='mmmilan.NonFiniteLossHook'),
]

train_dataloader = dict(
    num_workers=0,
    dataset=dict(
        data_root='data/cifar10/train',
        captions='work_dirs/study/captions.csv',
        pipeline=[
            dict(type='mmmilan.LoadRandomResizedCrop', scale=32, crop_ratio_range=(0.5, 1.0), flip_prob=0.5),
            dict(type='mmmilan.TokenizeCaption', context_length=16),
            dict(type='PackInputs', algorithm_keys=('text',)),
        ],
    ),
)
test_dataloader = dict(
    batch_size=100,
    num_workers=0,
    dataset=dict(data_root='data/cifar10/test', pipeline=[dict(type='mmmilan.LoadImage'), dict(type='PackInputs')]),
)
test_cfg = dict(templates=['a photo of a {}.'])

EPOCHS = 6
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=1, T_max=EPOCHS - 1, end=EPOCHS, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=EPOCHS)
