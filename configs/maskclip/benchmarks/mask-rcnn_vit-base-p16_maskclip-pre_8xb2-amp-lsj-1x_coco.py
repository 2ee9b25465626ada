# Mask R-CNN on COCO with MaskCLIP's encoder, by MILAN's recipe: MaskCLIP's own is not at hand (its summary: +1.8 AP over CLIP).
_base_ = '../../detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py'

# Where the encoder starts, as in the base, which reads another default.
pretrain = '{{$PRETRAIN:maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m}}'
model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrain)))
