# Semantic-aware probing of a MILAN ViT-B/16 (paper, table 7, row 6: 80.0): the frozen encoder sees the half of the patches
# to which CLIP's class token attends most, in training and in validation. The paper says 50 %, as here; the published
# code keeps 137 of 196: --cfg-options model.backbone.keep_ratio=0.7
# 8 GPUs x 2048 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-base-p16_milan-pre_8xb2048-semantic-aware-linear-coslr-100e_in1k.py 8
_base_ = './vit-base-p16_milan-pre_8xb2048-linear-coslr-100e_in1k.py'

model = dict(
    type='mmmilan.SemanticAwareClassifier',
    backbone=dict(
        type='mmmilan.SemanticAwareViT',
        keep_ratio=0.5,
        teacher=dict(
            type='mmmilan.OpenCLIPTeacher',
            model='ViT-B-16-quickgelu',
            pretrained='openai',
            teacher_mean_std=None,  # published code: CLIP sees the student's pixels, by ImageNet's statistics
        ),
    ),
)
