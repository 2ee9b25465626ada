# MILAN, ViT-L/16, CLIP ViT-L/14 target (paper, appendix A.1; table 9, row 2: 87.8 fine-tuned). That the teacher sees 196
# pixels, so that its grid is 14 x 14 too, is this project's reading: the paper does not say how the two grids meet.
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/milan_vit-large-p16_16xb256-amp-coslr-400e_in1k.py 8
# on each of 2 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = './milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    backbone=dict(arch='large'),
    neck=dict(embed_dim=1024, predict_feature_dim=768),
    head=dict(teacher=dict(model='ViT-L-14-quickgelu', input_size=196)),
)
