# Mask R-CNN with MaskCLIP's encoder.
_base_ = '../../detection/mask-rcnn_milan_vit-base-p16_1x_coco.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint='work_dirs/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m/epoch_25.pth')))
