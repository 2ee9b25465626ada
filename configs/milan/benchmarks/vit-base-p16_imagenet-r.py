# A fine-tuned ViT-B/16 on ImageNet-R, scored among its 200 classes (paper, table 4).
_base_ = './vit-base-p16_imagenet-a.py'

test_dataloader = dict(dataset=dict(data_root='data/imagenet-r'))
