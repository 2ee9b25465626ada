# The MAE baseline: pixel target, vanilla decoder, random masking (paper, table 5, row 1: 83.0 fine-tuned). MAE normalises
# the pixels of each patch; the paper does not say.
_base_ = './milan-pixel-random-masking_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(type='mmmilan.MAEDecoder'),
)
