# A fine-tuned ViT-L/16 on ImageNet-Sketch (paper, table 4).
_base_ = './vit-base-p16_imagenet-sketch.py'

model = dict(backbone=dict(arch='large'), head=dict(in_channels=1024))
