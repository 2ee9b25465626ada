# Pixel target and prompting decoder with random masking (paper, table 5, row 3: 83.0 fine-tuned).
_base_ = './milan-pixel_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    masking=dict(type='mmmilan.RandomMasking'),
    head=dict(teacher=None),
)
