# MILAN on your own images, on one GPU, from weights that know images already. Set these three, here or in the
# shell: DATA_ROOT=/data/my_images BATCH_SIZE=128 EPOCHS=50 python tools/train.py configs/milan/milan_vit-base-p16_custom.py
_base_ = ['./milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py', '../_base_/custom_schedule.py']

data_root = '{{$DATA_ROOT:data/custom}}'  # any folder of images, flat or nested
batch_size = int('{{$BATCH_SIZE:128}}')  # as many as fit the GPU; the learning rate follows

# Where the encoder starts: a name of the model zoo, a URL or a file, of MILAN, MAE or any ImageNet ViT-B/16; None for
# random weights.
checkpoint = '{{$CHECKPOINT:milan_vit-base-p16_16xb256-amp-coslr-400e_in1k}}'

model = dict(
    backbone=dict(init_cfg=None if checkpoint == 'None' else dict(type='Pretrained', checkpoint=checkpoint))
)

train_dataloader = dict(batch_size=batch_size, dataset=dict(data_root=data_root))
test_dataloader = dict(batch_size=batch_size, dataset=dict(data_root=data_root))

auto_scale_lr = dict(enable=True)
param_scheduler = {{_base_.custom_schedule}}
train_cfg = dict(max_epochs={{_base_.epochs}})
