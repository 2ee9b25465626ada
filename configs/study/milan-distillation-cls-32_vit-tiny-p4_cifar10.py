# Knowledge distillation, and the class token weighs in the loss as much as 32 patches.
_base_ = './milan-distillation_vit-tiny-p4_cifar10.py'

model = dict(head=dict(cls_token=32))
