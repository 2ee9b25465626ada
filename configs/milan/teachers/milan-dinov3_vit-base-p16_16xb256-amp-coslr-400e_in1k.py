# DINOv3 ViT-B/16 as the teacher: no language, but patch features that keep their place. Its weights are gated: accept their
# licence at https://huggingface.co/timm/vit_base_patch16_dinov3.lvd1689m and run `hf auth login`, or give pretrained=FILE.
# MILAN's recipe, not tuned for this teacher; docs/teachers.md says which teacher is for what. No published score.
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/teachers/milan-dinov3_vit-base-p16_16xb256-amp-coslr-400e_in1k.py 8
# on each of 2 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = '../milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

model = dict(
    neck=dict(predict_feature_dim=768),
    head=dict(
        teacher=dict(
            _delete_=True, type='mmmilan.TimmTeacher', model='vit_base_patch16_dinov3.lvd1689m', input_size=224
        ),
    ),
)
