# Fine-tuning on your own images: one folder a class, below train/ and val/. Set these here or in the shell:
# DATA_ROOT=/data/my_images CLASSES=3 BATCH_SIZE=64 EPOCHS=50 python tools/train.py configs/milan/benchmarks/vit-base-p16_milan-pre_custom.py
_base_ = ['./vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py', '../../_base_/custom_schedule.py']

data_root = '{{$DATA_ROOT:data/custom}}'
num_classes = int('{{$CLASSES:10}}')
batch_size = int('{{$BATCH_SIZE:64}}')

model = dict(data_preprocessor=dict(num_classes=num_classes), head=dict(num_classes=num_classes))

train_dataloader = dict(batch_size=batch_size, dataset=dict(data_root=data_root + '/train'))
val_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        _delete_=True,
        type='mmmilan.ImageFolder',
        data_root=data_root + '/val',
        with_label=True,
        pipeline={{_base_.test_dataloader.dataset.pipeline}},
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, min(5, num_classes)))
test_evaluator = val_evaluator

auto_scale_lr = dict(enable=True)
param_scheduler = {{_base_.custom_schedule}}
train_cfg = dict(max_epochs={{_base_.epochs}})
