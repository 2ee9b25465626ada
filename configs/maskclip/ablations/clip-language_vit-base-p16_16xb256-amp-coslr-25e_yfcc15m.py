# CLIP with masked language modelling, without masked self-distillation.
_base_ = '../maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

model = dict(distillation_weight=0)
