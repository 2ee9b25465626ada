# The recipe few-images with one crop of each image, on which the teacher runs once, at half the epochs.
_base_ = './milan-few-images_vit-tiny-p4_cifar10.py'

train_dataloader = dict(sampler=dict(crops=1))
train_cfg = dict(max_epochs=2)
default_hooks = dict(teacher_cache=dict(type='mmmilan.TeacherCacheHook'))
