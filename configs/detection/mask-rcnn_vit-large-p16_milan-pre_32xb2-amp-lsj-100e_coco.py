# Mask R-CNN, ViT-L/16, for 100 epochs, as in arXiv 2111.11429 and hustvl/MIMDet (MILAN's paper has no figure for it).
# 32 GPUs x 2 images: bash tools/dist_train.sh configs/detection/mask-rcnn_vit-large-p16_milan-pre_32xb2-amp-lsj-100e_coco.py 8
# on each of 4 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = './mask-rcnn_vit-large-p16_milan-pre_32xb2-amp-lsj-25e_coco.py'

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, end=0.25, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', begin=0.25, T_max=99.75, end=100, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100, val_interval=10)
