# The MAE baseline on pixels as they are, not normalised patch by patch. The paper has no such row.
_base_ = './mae_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    head=dict(norm_pix=False),
)
