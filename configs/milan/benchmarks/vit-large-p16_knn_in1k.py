# k-NN on the class token of a frozen ViT-L/16, on ImageNet-1k: nothing is trained. The checkpoint is anything that
# holds the encoder. The paper has no such figure.
# python tools/test.py configs/milan/benchmarks/vit-large-p16_knn_in1k.py work_dirs/milan_vit-large-p16_16xb256-amp-coslr-400e_in1k/epoch_400.pth
_base_ = './vit-base-p16_knn_in1k.py'

model = dict(backbone=dict(arch='large'))
