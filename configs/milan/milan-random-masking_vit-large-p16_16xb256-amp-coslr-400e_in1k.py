# MILAN, ViT-L/16, with uniform random masking (table 8, RS).
_base_ = './milan_vit-large-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(masking=dict(type='mmmilan.RandomMasking'))
