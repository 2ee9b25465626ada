# Mask R-CNN, ViT-L/16, on the 25-epoch schedule of hustvl/MIMDet (MILAN's paper has no figure for it).
# 32 GPUs x 2 images: bash tools/dist_train.sh configs/detection/mask-rcnn_vit-large-p16_milan-pre_32xb2-amp-lsj-25e_coco.py 8
# on each of 4 machines, with NNODES, NODE_RANK and MASTER_ADDR set.
_base_ = [
    '../_base_/mask-rcnn_vit-large-p16.py',
    '../_base_/coco_instance_lsj.py',
    '../_base_/detection_lsj.py',
    '../_base_/detection_runtime.py',
]
