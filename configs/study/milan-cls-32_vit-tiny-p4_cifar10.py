# The class token weighs in the loss as much as 32 patches: a third of it in place of a 65th.
_base_ = './milan_vit-tiny-p4_cifar10.py'

model = dict(head=dict(cls_token=32))
