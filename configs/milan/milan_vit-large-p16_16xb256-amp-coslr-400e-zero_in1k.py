# MILAN, ViT-L/16, the optimizer's states shared out over all processes (ZeRO, stage 1): less memory, the same results.
_base_ = './milan_vit-large-p16_16xb256-amp-coslr-400e_in1k.py'

optim_wrapper = dict(optimizer=dict(type='mmmilan.ZeroRedundancyOptimizer', optimizer_type='AdamW'))
default_hooks = dict(checkpoint=dict(type='mmmilan.ZeroCheckpointHook'))
