# MILAN without its teacher: features and importance maps come from a cache (docs/efficiency.md), and SemanticAwareMasking is a step
# of the data pipeline, so the data workers draw the masks: the same ones whenever a cached crop comes again.
# First: python tools/cache_targets.py configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py data/milan_cache --epochs 10
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/milan-cached_vit-base-p16_16xb256-amp-coslr-400e_in1k.py 8
_base_ = './milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

cache = 'data/milan_cache'

model = dict(
    type='mmmilan.CachedMILAN',
    head=dict(
        teacher=dict(_delete_=True, type='mmmilan.CachedTeacher', cache=cache, of={{_base_.model.head.teacher}}),
    ),
)

train_dataloader = dict(
    dataset=dict(
        type='mmmilan.CachedTargets',
        cache=cache,
        pipeline=[
            dict(type='mmmilan.LoadRandomResizedCrop', scale=224, crop_ratio_range=(0.2, 1.0), flip_prob=0.5),
            dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75),
            dict(type='PackInputs'),
        ],
    ),
)
