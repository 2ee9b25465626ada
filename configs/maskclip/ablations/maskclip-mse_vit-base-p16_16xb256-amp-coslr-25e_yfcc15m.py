# Distillation by the mean squared error of the features.
_base_ = '../maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

model = dict(head=dict(_delete_=True, type='mmmilan.FeatureTarget', feature_dim=768))
