# YFCC-15M, captioned images in tar shards, for CLIP training; tools/test.py classifies ImageNet-1k zero-shot.
model = dict(
    data_preprocessor=dict(
        type='mmmilan.CaptionDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    )
)

train_dataloader = dict(
    batch_size=256,
    num_workers=12,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='mmmilan.ShardSampler'),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmmilan.CaptionedShards',
        data_root='data/yfcc15m',
        pipeline=[
            dict(type='mmmilan.LoadRandomResizedCrop', scale=224, crop_ratio_range=(0.5, 1.0), flip_prob=0.5),
            dict(type='mmmilan.TokenizeCaption', context_length=77),
            dict(type='PackInputs', algorithm_keys=('text',)),
        ],
    ),
)

test_dataloader = dict(
    batch_size=256,
    num_workers=12,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmpretrain.ImageNet',
        data_root='data/imagenet',
        split='val',
        pipeline=[
            dict(type='mmmilan.LoadImage'),
            dict(type='ResizeEdge', scale=224, edge='short', backend='pillow', interpolation='bicubic'),
            dict(type='CenterCrop', crop_size=224),
            dict(type='PackInputs'),
        ],
    ),
)
test_evaluator = dict(type='mmpretrain.Accuracy', topk=(1, 5))
test_cfg = dict(type='mmmilan.ZeroShotLoop', templates='openai', class_names='imagenet')
