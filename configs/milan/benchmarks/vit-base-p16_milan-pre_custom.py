# Fine-tuning on your own images: one folder a class, below train/ and val/.
# DATA_ROOT=/data/my_images CLASSES=3 BATCH_SIZE=64 EPOCHS=50 python tools/train.py configs/milan/benchmarks/vit-base-p16_milan-pre_custom.py
# Another start: PRETRAIN. An encoder of another size: ARCH=tiny, small, large.
_base_ = [
    './vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py',
    '../../_base_/custom_data.py',
    '../../_base_/custom_schedule.py',
    '../../_base_/custom_encoder.py',
]

model = dict(
    data_preprocessor=dict(num_classes={{_base_.num_classes}}),
    backbone=dict(arch={{_base_.arch}}),
    head=dict(num_classes={{_base_.num_classes}}, in_channels={{_base_.width}}),
)
train_dataloader = {{_base_.custom_train_dataloader}}
val_dataloader = dict(
    batch_size={{_base_.batch_size}},
    num_workers=4,
    dataset=dict(_delete_=True, pipeline={{_base_.test_dataloader.dataset.pipeline}}, **_base_.custom_val_dataset),
)
test_dataloader = val_dataloader
val_evaluator = {{_base_.custom_evaluator}}
test_evaluator = val_evaluator
auto_scale_lr = dict(enable=True)
param_scheduler = {{_base_.custom_schedule}}
train_cfg = dict(max_epochs={{_base_.epochs}})
