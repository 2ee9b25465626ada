# Pixel target with prompting decoder and semantic-aware masking (paper, table 5, row 5: 83.3 fine-tuned).
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(predict_feature_dim=768),
    head=dict(type='mmmilan.PixelTarget', norm_pix=True),
)
