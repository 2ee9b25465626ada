# The demo's baseline: MAE with the encoder, the data and the budget of its MILAN.
_base_ = './milan_vit-tiny-p8_scenes.py'

model = dict(
    masking=dict(type='mmmilan.RandomMasking'),
    neck=dict(type='mmmilan.MAEDecoder', predict_feature_dim=192),
    head=dict(type='mmmilan.PixelTarget', norm_pix=True, patch_size=8, teacher=None),
)
