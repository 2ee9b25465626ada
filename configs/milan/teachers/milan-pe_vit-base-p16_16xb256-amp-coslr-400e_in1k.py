# Perception Encoder (PE-Core) ViT-B/16 as the teacher: CLIP's loss with more data, and a pooling query over class token and
# patches. MILAN's recipe, not tuned for this teacher; docs/teachers.md says which teacher is for what. No published score.
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/teachers/milan-pe_vit-base-p16_16xb256-amp-coslr-400e_in1k.py 8
# on each of 2 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(predict_feature_dim=1024),
    head=dict(teacher=dict(model='PE-Core-B-16', pretrained='meta', teacher_mean_std='own')),
)
