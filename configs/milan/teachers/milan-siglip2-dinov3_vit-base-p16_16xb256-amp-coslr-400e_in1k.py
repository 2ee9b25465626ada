# SigLIP 2 for language and DINOv3 for space, both predicted by one decoder. The masks are drawn by the first teacher, SigLIP 2;
# change their order for masks by DINOv3. DINOv3's weights are gated, see milan-dinov3_*.py.
# MILAN's recipe, not tuned for these teachers; docs/teachers.md says which teacher is for what. No published score.
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/teachers/milan-siglip2-dinov3_vit-base-p16_16xb256-amp-coslr-400e_in1k.py 8
# on each of 2 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(predict_feature_dim=768 + 768),
    head=dict(
        _delete_=True,
        type='mmmilan.SumTarget',
        targets=[
            dict(
                type='mmmilan.CLIPTarget',
                teacher=dict(
                    type='mmmilan.OpenCLIPTeacher',
                    model='ViT-B-16-SigLIP2',
                    pretrained='webli',
                    teacher_mean_std='own',
                ),
            ),
            dict(
                type='mmmilan.CLIPTarget',
                teacher=dict(type='mmmilan.TimmTeacher', model='vit_base_patch16_dinov3.lvd1689m', input_size=224),
            ),
        ],
    ),
)
