# Pixel target and semantic-aware masking with the vanilla decoder (paper, table 5, row 4: 83.3 fine-tuned).
_base_ = './milan-pixel_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(type='mmmilan.MAEDecoder'),
)
