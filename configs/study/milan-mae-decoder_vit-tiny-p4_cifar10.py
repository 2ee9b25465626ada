# CLIP target and semantic-aware masking with MAE's decoder (table 5, row 6).
_base_ = './milan_vit-tiny-p4_cifar10.py'

model = dict(neck=dict(type='mmmilan.MAEDecoder'))
