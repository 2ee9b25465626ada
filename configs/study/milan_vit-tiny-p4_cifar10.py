# The study's MILAN (docs/reproduction.md), on images of CIFAR-10 that its teacher has not seen.
_base_ = '../demo/milan_vit-tiny-p8_scenes.py'

model = dict(
    backbone=dict(arch=dict(embed_dims=96, num_heads=3, feedforward_channels=384), img_size=32, patch_size=4),
    neck=dict(embed_dim=96, decoder_embed_dim=72, predict_feature_dim=96),
    head=dict(teacher=dict(pretrained='work_dirs/study/teacher/epoch_6.pth', head_width=32)),
)

train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    drop_last=True,
    dataset=dict(
        data_root='data/cifar10/train',
        pipeline=[
            dict(type='mmmilan.LoadRandomResizedCrop', scale=32, crop_ratio_range=(0.5, 1.0), flip_prob=0.5),
            dict(type='PackInputs'),
        ],
    ),
)
test_dataloader = dict(
    batch_size=100,
    num_workers=0,
    dataset=dict(data_root='data/cifar10/test', pipeline=[dict(type='mmmilan.LoadImage'), dict(type='PackInputs')]),
)

# tools/study/arms.py sets the schedule, and scales the epochs with the budget
train_cfg = dict(max_epochs=4)
custom_hooks = [dict(type='mmmilan.StepSeedHook'), dict(type='mmmilan.NonFiniteLossHook')]
visualizer = dict(vis_backends=[dict(type='LocalVisBackend')])
