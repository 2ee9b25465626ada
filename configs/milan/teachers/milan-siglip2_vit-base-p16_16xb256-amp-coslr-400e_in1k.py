# SigLIP 2 ViT-B/16 as the teacher: language by a sigmoid loss, and a pooling query in place of a class token.
# MILAN's recipe, not tuned for this teacher; docs/teachers.md says which teacher is for what. No published score.
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/teachers/milan-siglip2_vit-base-p16_16xb256-amp-coslr-400e_in1k.py 8
# on each of 2 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(predict_feature_dim=768),
    head=dict(teacher=dict(model='ViT-B-16-SigLIP2', pretrained='webli', teacher_mean_std='own')),
)
