# CLIP target and prompting decoder with random masking (table 5, row 7).
_base_ = './milan_vit-tiny-p4_cifar10.py'

model = dict(masking=dict(type='mmmilan.RandomMasking'))
