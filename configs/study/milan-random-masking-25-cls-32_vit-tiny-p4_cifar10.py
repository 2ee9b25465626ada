# A quarter of the patches masked at random, and the class token weighs in the loss as much as 32 patches; in the time
# of 4 epochs with three quarters masked.
_base_ = './milan-random-masking-50-cls-32_vit-tiny-p4_cifar10.py'

model = dict(masking=dict(mask_ratio=0.25))
