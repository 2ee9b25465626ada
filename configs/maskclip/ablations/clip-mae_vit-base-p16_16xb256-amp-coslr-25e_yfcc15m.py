# CLIP + MAE: the pixels of the masked patches, normalised by patch, in place of the mean teacher's tokens.
_base_ = './clip-distillation_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

model = dict(head=dict(_delete_=True, type='mmmilan.PixelTarget', norm_pix=True, patch_size=16))
