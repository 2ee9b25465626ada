# k-NN on the class token of a frozen ViT-B/16, on ImageNet-1k: nothing is trained. The checkpoint is anything that
# holds the encoder. The paper has no such figure.
# python tools/test.py configs/milan/benchmarks/vit-base-p16_knn_in1k.py work_dirs/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k/epoch_400.pth
_base_ = './vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'

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
