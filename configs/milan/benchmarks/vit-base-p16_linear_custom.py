# Linear probe on your own images: one folder a class, below train/ and val/. The encoder is frozen.
# PRETRAIN=runs/photos/milan.pth DATA_ROOT=/data/my_images CLASSES=3 python tools/train.py configs/milan/benchmarks/vit-base-p16_linear_custom.py
# An encoder of another size: ARCH=tiny, small, large. BATCH_SIZE and EPOCHS can be set, too.
_base_ = [
    './vit-base-p16_milan-pre_8xb2048-linear-coslr-100e_in1k.py',
    '../../_base_/custom_data.py',
    '../../_base_/custom_schedule.py',
    '../../_base_/custom_encoder.py',
]

model = dict(
    data_preprocessor=dict(num_classes={{_base_.num_classes}}),
    backbone=dict(arch={{_base_.arch}}, frozen_stages={{_base_.depth}}),
    neck=dict(input_features={{_base_.width}}),
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

# LARS at the rate for a batch of 16384 would not move a small one: AdamW.
optim_wrapper = dict(
    _delete_=True,
    type='mmmilan.BFloat16OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.0, fused=True),
)
auto_scale_lr = dict(enable=False)
param_scheduler = {{_base_.custom_schedule}}
train_cfg = dict(max_epochs={{_base_.epochs}})
