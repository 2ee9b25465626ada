# CLIP target only: vanilla decoder, random masking (paper, table 5, row 2: 83.9 fine-tuned).
_base_ = '../milan-random-masking_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(type='mmmilan.MAEDecoder'),
)
