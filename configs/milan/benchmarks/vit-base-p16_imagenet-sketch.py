# A fine-tuned ViT-B/16 on ImageNet-Sketch, which has all 1000 classes (paper, table 4: 46.3).
# python tools/test.py configs/milan/benchmarks/vit-base-p16_imagenet-sketch.py work_dirs/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k/epoch_100.pth
_base_ = './vit-base-p16_imagenet-a.py'

test_dataloader = dict(dataset=dict(data_root='data/imagenet-sketch'))
