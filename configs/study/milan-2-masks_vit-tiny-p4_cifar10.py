# Two masks of each image at half the epochs and half the batch: as many steps and masked views.
_base_ = './milan_vit-tiny-p4_cifar10.py'

model = dict(masks_per_image=2)
train_dataloader = dict(batch_size=8)
train_cfg = dict(max_epochs=2)
