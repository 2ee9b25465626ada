# Fine-tuning of MaskCLIP's encoder.
_base_ = '../../milan/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py'

model = dict(backbone=dict(init_cfg=dict(checkpoint='work_dirs/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m/epoch_25.pth')))
