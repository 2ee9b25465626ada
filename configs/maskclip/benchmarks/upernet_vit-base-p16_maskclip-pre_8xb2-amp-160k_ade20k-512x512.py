# UperNet on ADE20K with MaskCLIP's encoder, by MILAN's recipe: MaskCLIP's own is not at hand (its summary: +2.7 mIoU over CLIP).
_base_ = '../../segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py'

# Where the encoder starts, as in the base, which reads another default.
pretrain = '{{$PRETRAIN:maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m}}'
model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrain)))
