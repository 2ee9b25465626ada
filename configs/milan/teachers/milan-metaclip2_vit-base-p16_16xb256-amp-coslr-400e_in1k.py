# MetaCLIP 2 ViT-H/14 as the teacher: captions in many languages. It sees 196 pixels, so that its 14 x 14 patches of 14 are
# the student's grid, and its weights are held in bfloat16, which changes no bit where training is in bfloat16.
# MILAN's recipe, not tuned for this teacher; docs/teachers.md says which teacher is for what. No published score.
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/teachers/milan-metaclip2_vit-base-p16_16xb256-amp-coslr-400e_in1k.py 8
# on each of 2 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(predict_feature_dim=1024),
    head=dict(
        teacher=dict(
            model='ViT-H-14-worldwide-quickgelu',
            pretrained='metaclip2_worldwide',
            input_size=196,
            teacher_mean_std='own',
            weight_dtype='bfloat16',
        ),
    ),
)
