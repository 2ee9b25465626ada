# UperNet with MaskCLIP's encoder.
_base_ = '../../segmentation/upernet_milan_vit-base-p16_160k_ade20k-512x512.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint='work_dirs/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m/epoch_25.pth')))
