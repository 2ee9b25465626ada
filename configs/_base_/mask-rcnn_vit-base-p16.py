# Mask R-CNN as in hustvl/MIMDet's benchmarking models, which reproduce arXiv 2111.11429: no class token, positions of
# the 64 x 64 grid's own, windows of 16 x 16 patches but in four blocks, relative positions; SyncBN in FPN and heads.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

# Where the encoder starts; see configs/milan/README.md.
pretrain = '{{$PRETRAIN:milan_vit-base-p16_16xb256-amp-coslr-400e_in1k}}'

norm_cfg = dict(type='SyncBN')
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),  # to 1024 x 1024, in training and evaluation
    backbone=dict(
        _delete_=True,
        type='mmmilan.DenseViT',
        arch='base',
        img_size=1024,
        out_indices=(2, 5, 8, 11),
        with_cls_token=False,
        sincos_pos_embed=True,
        window_size=16,
        global_indices=(2, 5, 8, 11),
        rel_pos_bias='shared',
        scale_norm_cfg=dict(type='GN', num_groups=32),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=pretrain),
    ),
    neck=dict(in_channels=[768, 768, 768, 768], norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
