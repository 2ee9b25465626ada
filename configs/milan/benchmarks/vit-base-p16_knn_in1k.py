# k-NN on the class token of a frozen ViT-B/16, on ImageNet-1k: nothing is trained. CHECKPOINT is anything that holds
# the encoder, such as a pretraining checkpoint: python tools/test.py THIS_FILE CHECKPOINT
_base_ = './vit-base-p16_8xb128-coslr-100e_in1k.py'

model = dict(
    data_preprocessor=dict(num_classes=None),  # as many as the labelled images have
    backbone=dict(out_type='cls_token', final_norm=True),
    head=None,
    train_cfg=None,
)

test_cfg = dict(
    type='mmmilan.KNNLoop',
    bank_dataloader=dict(
        batch_size=128,
        num_workers=12,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
        dataset=dict(
            type='mmmilan.ImageFolder',
            data_root='data/imagenet/train',
            with_label=True,
            pipeline={{_base_.test_dataloader.dataset.pipeline}},
        ),
    ),
)
