# k-NN on your own images: one folder a class, below train/ (which vote) and val/ (which are asked). Nothing is trained.
# DATA_ROOT=/data/my_images python tools/test.py configs/milan/benchmarks/vit-base-p16_knn_custom.py runs/photos/milan.pth
# An encoder of another size: ARCH=tiny, small, large.
_base_ = ['./vit-base-p16_knn_in1k.py', '../../_base_/custom_data.py', '../../_base_/custom_encoder.py']

model = dict(backbone=dict(arch={{_base_.arch}}))
test_dataloader = dict(
    batch_size={{_base_.batch_size}},
    num_workers=4,
    dataset=dict(_delete_=True, pipeline={{_base_.test_dataloader.dataset.pipeline}}, **_base_.custom_val_dataset),
)
test_evaluator = dict(topk=(1,))
test_cfg = dict(bank_dataloader={{_base_.custom_train_dataloader}})
