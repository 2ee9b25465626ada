# Mask R-CNN on COCO from a MILAN ViT-B/16 (paper, table 3 and appendix A.1: box AP 52.6, mask AP 45.5).
# 8 GPUs x 2 images: bash tools/dist_train.sh configs/detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py 8
_base_ = [
    '../_base_/mask-rcnn_vit-base-p16.py',
    '../_base_/coco_instance_lsj.py',
    '../_base_/detection_1x.py',
    '../_base_/detection_runtime.py',
]
