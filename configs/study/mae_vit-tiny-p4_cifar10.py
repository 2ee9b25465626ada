# MAE: pixels of the masked patches, each patch normalised (table 5, row 1).
_base_ = './milan-mae-decoder-random-masking_vit-tiny-p4_cifar10.py'

model = dict(
    neck=dict(predict_feature_dim=48),
    head=dict(_delete_=True, type='mmmilan.PixelTarget', norm_pix=True, patch_size=4),
)
