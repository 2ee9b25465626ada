# MILAN, ViT-B/16, CLIP ViT-B/16 target, 400 epochs of ImageNet-1k (paper, appendix A.1; table 5, row 8: 85.4 fine-tuned).
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py 8
# on each of 2 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = [
    '../_base_/imagenet_pretrain.py',
    '../_base_/pretrain_adamw_coslr_400e.py',
    '../_base_/default_runtime.py',
]

model = dict(
    type='mmmilan.MILAN',
    backbone=dict(type='mmmilan.MILANViT', arch='base', img_size=224, patch_size=16),
    masking=dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75),
    neck=dict(
        type='mmmilan.PromptingDecoder',
        num_patches=196,
        embed_dim=768,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        mlp_ratio=4,
        predict_feature_dim=512,
    ),
    head=dict(
        type='mmmilan.CLIPTarget',
        teacher=dict(
            type='mmmilan.OpenCLIPTeacher',
            model='ViT-B-16-quickgelu',
            pretrained='openai',
            teacher_mean_std=None,  # published code: CLIP sees the student's pixels, by ImageNet's statistics
        ),
    ),
)

default_hooks = dict(checkpoint=dict(interval=20))
