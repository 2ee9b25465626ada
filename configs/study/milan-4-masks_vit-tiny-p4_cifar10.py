# Four masks of each image, prompts only and a third predicted, at a quarter of the epochs and of the batch.
_base_ = './milan-prompts-only_vit-tiny-p4_cifar10.py'

model = dict(masks_per_image=4)
train_dataloader = dict(batch_size=4)
train_cfg = dict(max_epochs=1)
