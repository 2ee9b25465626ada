# A fine-tuned ViT-B/16 on ImageNet-A, scored among its 200 classes (paper, table 4):
# python tools/test.py THIS_FILE CHECKPOINT_OF_FINE-TUNING
_base_ = './vit-base-p16_8xb128-coslr-100e_in1k.py'

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
