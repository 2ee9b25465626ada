# MILAN, ViT-B/16, with uniform random masking (paper, table 5, row 7: 85.1 fine-tuned; table 8, RS: 79.9 probed).
_base_ = './milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(masking=dict(type='mmmilan.RandomMasking'))
