# Fine-tuning on your own images: one folder a class, below train/ and val/. Set these here or in the shell:
# DATA_ROOT=/data/my_images CLASSES=3 BATCH_SIZE=64 EPOCHS=20 python tools/train.py configs/milan/benchmarks/vit-base-p16_custom.py
_base_ = './vit-base-p16_8xb128-coslr-100e_in1k.py'

data_root = '{{$DATA_ROOT:data/custom}}'
num_classes = int('{{$CLASSES:10}}')
batch_size = int('{{$BATCH_SIZE:64}}')
epochs = int('{{$EPOCHS:20}}')

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
warmup = max(1, epochs // 10)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=warmup, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        T_max=max(1, epochs - warmup),
        begin=warmup,
        end=max(epochs, warmup + 1),
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=epochs)
