# What detection and segmentation share: AdamW with layer decay, no weight decay on class token and positions.
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), fused=True),
    constructor='mmmilan.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys={'.cls_token': no_decay, '.pos_embed': no_decay, '.rel_pos': no_decay}),
)
auto_scale_lr = dict(base_batch_size=16)
val_cfg = dict()
test_cfg = dict()
