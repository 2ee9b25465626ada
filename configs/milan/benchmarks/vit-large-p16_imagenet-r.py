# A fine-tuned ViT-L/16 on ImageNet-R, scored among its 200 classes (paper, table 4: 76.6).
# python tools/test.py configs/milan/benchmarks/vit-large-p16_imagenet-r.py work_dirs/vit-large-p16_milan-pre_8xb128-coslr-100e_in1k/epoch_100.pth
_base_ = './vit-base-p16_imagenet-r.py'

model = dict(backbone=dict(arch='large'), head=dict(in_channels=1024))
