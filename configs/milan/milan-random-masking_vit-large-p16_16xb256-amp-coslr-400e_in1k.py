# MILAN, ViT-L/16, with uniform random masking (paper, table 8, RS: 84.3 probed).
_base_ = './milan_vit-large-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(masking=dict(type='mmmilan.RandomMasking'))
