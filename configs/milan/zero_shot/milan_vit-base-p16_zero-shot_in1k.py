# Zero-shot classification of ImageNet-1k by a MILAN checkpoint, decoder included: what it predicts for the class token
# of a whole image, against CLIP's texts. Nothing is trained. The paper has no such figure.
# python tools/test.py configs/milan/zero_shot/milan_vit-base-p16_zero-shot_in1k.py work_dirs/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k/epoch_400.pth
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmpretrain.ImageNet',
        data_root='data/imagenet',
        split='val',
        pipeline={{_base_.test_dataloader.dataset.pipeline}},
    )
)
test_evaluator = dict(_delete_=True, type='mmpretrain.Accuracy', topk=(1, 5))
test_cfg = dict(type='mmmilan.ZeroShotLoop', templates='openai', class_names='imagenet')
