# MILAN, ViT-L/16, its weights, gradients and optimizer states sharded over all processes (FSDP), and the activations
# of its blocks recomputed: less memory, more communication and computation. The same results.
_base_ = './milan_vit-large-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(backbone=dict(with_cp=True), neck=dict(with_cp=True))

runner_type = 'FlexibleRunner'
strategy = dict(type='mmmilan.FullyShardStrategy')
