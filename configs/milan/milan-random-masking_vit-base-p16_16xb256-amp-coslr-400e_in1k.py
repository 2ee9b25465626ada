# MILAN, ViT-B/16, with uniform random masking (table 8, RS; table 5, row 7).
_base_ = './milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(masking=dict(type='mmmilan.RandomMasking'))
