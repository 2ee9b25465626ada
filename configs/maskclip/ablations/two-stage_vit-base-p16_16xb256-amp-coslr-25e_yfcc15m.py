# Two stages: first CLIP alone (clip_vit-base-p16_...), then a masked image model of its features, without texts. PRETRAIN: its
# checkpoint, by default the end of that run. The student has no text encoder, and so no zero-shot classification of its own.
_base_ = '../../milan/milan-random-masking_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

pretrain = '{{$PRETRAIN:work_dirs/clip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m/epoch_25.pth}}'
model = dict(head=dict(teacher=dict(_delete_=True, type='mmmilan.OpenCLIPTeacher', pretrained=pretrain)))
train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmmilan.ShardSampler'),
    dataset=dict(
        _delete_=True,
        type='mmmilan.CaptionedShards',
        data_root='data/yfcc15m',
        pipeline={{_base_.train_dataloader.dataset.pipeline}},
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=24, begin=1, end=25, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=25)
