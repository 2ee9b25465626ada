# Your own images with labels: one folder a class, below DATA_ROOT/train and DATA_ROOT/val.
data_root = '{{$DATA_ROOT:data/custom}}'
num_classes = int('{{$CLASSES:10}}')
batch_size = int('{{$BATCH_SIZE:64}}')
custom_train_dataloader = dict(batch_size=batch_size, num_workers=4, dataset=dict(data_root=data_root + '/train'))
custom_val_dataset = dict(type='mmmilan.ImageFolder', data_root=data_root + '/val', with_label=True)
custom_evaluator = dict(topk=(1, min(5, num_classes)))
