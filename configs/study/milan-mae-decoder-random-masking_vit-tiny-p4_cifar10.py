# CLIP target with MAE's decoder and masking (table 5, row 2).
_base_ = './milan-mae-decoder_vit-tiny-p4_cifar10.py'

model = dict(masking=dict(type='mmmilan.RandomMasking'))
