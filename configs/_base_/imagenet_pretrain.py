# ImageNet-1k without labels: random resized crop and flip (paper, appendix A.1).
model = dict(
    data_preprocessor=dict(
        type='mmmilan.PretrainingDataPreprocessor',
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
    sampler=dict(type='mmmilan.ReproducibleSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmmilan.ImageFolder',
        data_root='data/imagenet/train',
        pipeline=[
            dict(type='mmmilan.LoadRandomResizedCrop', scale=224, crop_ratio_range=(0.2, 1.0), flip_prob=0.5),
            dict(type='PackInputs'),
        ],
    ),
)

# tools/test.py reports the pretraining loss on whole validation images.
test_dataloader = dict(
    batch_size=256,
    num_workers=12,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmmilan.ImageFolder',
        data_root='data/imagenet/val',
        pipeline=[
            dict(type='mmmilan.LoadImage'),
            dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
            dict(type='CenterCrop', crop_size=224),
            dict(type='PackInputs'),
        ],
    ),
)
test_evaluator = dict(type='mmmilan.ReconstructionLoss')
test_cfg = dict()
