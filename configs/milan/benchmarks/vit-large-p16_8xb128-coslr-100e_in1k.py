# Fine-tuning of ViT-L/16 on ImageNet-1k (paper, appendix A.1).
_base_ = './vit-base-p16_8xb128-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='milan_vit-large-p16_16xb256-amp-coslr-400e_in1k'),
    ),
    head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.75))
