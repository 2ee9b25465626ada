# As OpenMMLab fine-tuned the encoder that it published (85.3): the rate ends at 1e-6 in every layer, where the published
# code multiplies that by the layer's decay too.
# 8 GPUs x 128 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k-openmmlab.py 8
_base_ = './vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=95, begin=5, end=100, eta_min=1e-6, convert_to_iter_based=True),
]
