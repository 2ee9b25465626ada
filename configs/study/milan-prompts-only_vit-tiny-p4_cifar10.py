# Mask tokens attend to the prompts alone, and a third of the masked patches is predicted.
_base_ = './milan_vit-tiny-p4_cifar10.py'

model = dict(neck=dict(self_attention=False, predict_ratio=1 / 3))
