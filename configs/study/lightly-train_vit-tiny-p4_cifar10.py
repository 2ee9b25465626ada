# LightlyTrain's distillation of the same teacher into the same encoder, its schedule fitted to small batches. `pretrain`
# holds the arguments of lightly_train.pretrain (docs.lightly.ai/train): the rate is for the batch as it is, colours are
# jittered as it does by default. Its epochs, 3 for 4 and 5 for 7, take the time of MILAN's, as a step sees no mask.
_base_ = './milan_vit-tiny-p4_cifar10.py'

pretrain = dict(
    method='distillationv3',
    method_args=dict(reference_batch_size=16),
    batch_size=16,
    optim_args=dict(lr=1e-3),
    transform_args=dict(image_size=(32, 32), random_resize=dict(min_scale=0.5, max_scale=1.0)),
)
train_cfg = dict(max_epochs=2.8)
