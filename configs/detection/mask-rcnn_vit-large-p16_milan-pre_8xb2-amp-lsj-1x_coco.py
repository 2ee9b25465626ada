# Mask R-CNN on COCO from a MILAN ViT-L/16 (paper, table 3 and appendix A.1: box AP 55.9, mask AP 48.2).
# 8 GPUs x 2 images: bash tools/dist_train.sh configs/detection/mask-rcnn_vit-large-p16_milan-pre_8xb2-amp-lsj-1x_coco.py 8
_base_ = [
    '../_base_/mask-rcnn_vit-large-p16.py',
    '../_base_/coco_instance_lsj.py',
    '../_base_/detection_1x.py',
    '../_base_/detection_runtime.py',
]

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.85))
