# k-NN on the class token of a frozen ViT-L/16.
_base_ = './vit-base-p16_knn_in1k.py'

model = dict(backbone=dict(arch='large'))
