# MaskCLIP (arXiv 2208.12262), ViT-B/16, on YFCC-15M (gain over CLIP in the paper's abstract: +6.9 zero-shot top-1).
# The paper's summary, which this follows, names the parts and gives no number: README.md here says whose each number is.
# 16 GPUs x 256 pairs: bash tools/dist_train.sh configs/maskclip/maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py 8
# on each of 2 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = ['../_base_/yfcc15m.py', '../_base_/default_runtime.py']

model = dict(
    type='mmmilan.MaskCLIP',
    backbone=dict(type='mmmilan.MILANViT', arch='base', img_size=224, patch_size=16),
    text=dict(context_length=77, vocab_size=49408, width=512, heads=8, layers=12),
    embed_dim=512,
    masking=dict(type='mmmilan.RandomMasking', mask_ratio=0.75),
    neck=dict(
        type='mmmilan.MAEDecoder',
        num_patches=196,
        embed_dim=768,
        decoder_embed_dim=512,
        decoder_depth=1,
        decoder_num_heads=16,
        predict_feature_dim=768,
    ),
    head=dict(
        type='mmmilan.CodewordTarget',
        feature_dim=768,
        num_codewords=8192,
        student_temperature=0.1,
        teacher_temperature=0.07,
        first_teacher_temperature=0.04,
        warmup_steps=3662,  # the first epoch
        center_momentum=0.9,
    ),
    language=dict(type='mmmilan.MaskedLanguageModel', mask_ratio=0.2, decoder_depth=1, decoder_num_heads=8),
    distillation_weight=0.05,
    language_weight=0.05,
)
default_hooks = dict(mean_teacher=dict(type='mmmilan.MeanTeacherHook', start=0.999, end=0.9999))

# The learning rate is for a batch of 4096; --auto-scale-lr adapts it to another one.
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    type='mmmilan.BFloat16OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.98), weight_decay=0.2, fused=True),
    constructor='mmmilan.GroupingOptimWrapperConstructor',
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            'cls_token': no_decay,
            'mask_token': no_decay,
            'positional_embedding': no_decay,
            'in_proj_bias': no_decay,
            'logit_scale': no_decay,
        },
    ),
)
auto_scale_lr = dict(base_batch_size=4096)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=24, begin=1, end=25, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=25)
