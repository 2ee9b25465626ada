# Training on your own images: EPOCHS of them, the first tenth for warm-up, then a cosine to 0.
epochs = int('{{$EPOCHS:50}}')
warmup = max(1, epochs // 10)
custom_schedule = [
    dict(type='LinearLR', start_factor=1e-4, end=warmup, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        T_max=max(1, epochs - warmup),
        begin=warmup,
        end=max(epochs, warmup + 1),
        convert_to_iter_based=True,
    ),
]
