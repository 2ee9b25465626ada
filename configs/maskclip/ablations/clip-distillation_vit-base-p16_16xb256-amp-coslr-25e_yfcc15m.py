# CLIP with masked self-distillation, without masked language modelling.
_base_ = '../maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

model = dict(language_weight=0)
