# The study's fine-tuning: all layers, mean of the patch tokens, layer decay 0.65, crops and flips.
_base_ = '../demo/vit-tiny-p8_finetune_scenes.py'

model = dict(
    backbone=dict(
        arch=dict(embed_dims=96, num_heads=3, feedforward_channels=384),
        img_size=32,
        patch_size=4,
        init_cfg=dict(checkpoint='work_dirs/study/MILAN-0/epoch_7.pth'),
    ),
    head=dict(in_channels=96),
)

train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    drop_last=True,
    dataset=dict(
        data_root='data/cifar10/train',
        data_prefix='',
        pipeline=[
            dict(type='mmmilan.LoadRandomResizedCrop', scale=32, crop_ratio_range=(0.5, 1.0), flip_prob=0.5),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    dataset=dict(
        data_root='data/cifar10/test',
        data_prefix='',
        pipeline=[dict(type='mmmilan.LoadImage'), dict(type='PackInputs')],
    ),
)
test_dataloader = val_dataloader
test_evaluator = dict(topk=(1,))

custom_hooks = [dict(type='mmmilan.StepSeedHook'), dict(type='mmmilan.NonFiniteLossHook')]
visualizer = dict(vis_backends=[dict(type='LocalVisBackend')])
