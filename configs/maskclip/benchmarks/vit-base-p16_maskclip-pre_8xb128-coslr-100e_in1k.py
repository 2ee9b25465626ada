# Fine-tuning on ImageNet-1k with MaskCLIP's encoder, by MILAN's recipe: MaskCLIP's own is not at hand (its summary: +1.3 top-1 over CLIP).
_base_ = '../../milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'

# Where the encoder starts, as in the base, which reads another default.
pretrain = '{{$PRETRAIN:maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m}}'
model = dict(backbone=dict(init_cfg=dict(checkpoint=pretrain)))
