# An image decoder of 4 blocks.
_base_ = '../maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

model = dict(neck=dict(decoder_depth=4))
