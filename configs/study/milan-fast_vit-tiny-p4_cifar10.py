# The combined recipe: two masks of each image, prompts only and a third predicted, at half the epochs and of the batch.
_base_ = ['./milan-2-masks_vit-tiny-p4_cifar10.py']

model = dict(neck=dict(self_attention=False, predict_ratio=1 / 3))
