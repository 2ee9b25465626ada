# A fine-tuned ViT-B/16 on ImageNet-A, scored among its 200 classes (paper, table 4: 62.2).
# python tools/test.py configs/milan/benchmarks/vit-base-p16_imagenet-a.py work_dirs/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k/epoch_100.pth
_base_ = './vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmmilan.ImageFolder',
        data_root='data/imagenet-a',
        with_label=True,
        pipeline={{_base_.test_dataloader.dataset.pipeline}},
    )
)
test_evaluator = dict(type='mmmilan.ImageNetSubsetAccuracy')
