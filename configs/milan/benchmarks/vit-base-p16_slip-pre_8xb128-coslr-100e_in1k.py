# SLIP itself fine-tuned on ImageNet-1k, to compare with its student (paper, section 3.4: 82.6, which it quotes), by MILAN's
# recipe with the class token as the feature, which is this project's reading.
# 8 GPUs x 128 images: bash tools/dist_train.sh configs/milan/benchmarks/vit-base-p16_slip-pre_8xb128-coslr-100e_in1k.py 8
_base_ = './vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'

# SLIP's file after 25 epochs, or that of PRETRAIN.
pretrain = '{{$PRETRAIN:https://dl.fbaipublicfiles.com/slip/slip_base_25ep.pt}}'
model = dict(backbone=dict(final_norm=True, out_type='cls_token', init_cfg=dict(checkpoint=pretrain)))
