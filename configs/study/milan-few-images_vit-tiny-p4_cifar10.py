# The recipe few-images of `mmmilan pretrain`: half of the patches masked at random, a third of the loss on the class
# token, and a decoder of one block.
_base_ = './milan-random-masking-cls-32_vit-tiny-p4_cifar10.py'

model = dict(masking=dict(mask_ratio=0.5), neck=dict(decoder_depth=1))
