# MILAN with a cache of what its teacher gives of 10 crops of each image (docs/efficiency.md). SemanticAwareMasking is a step of the
# data pipeline here, so the data workers draw the masks: the same ones whenever a crop comes again.
# First: python tools/cache_targets.py configs/milan/milan-cached_vit-base-p16_16xb256-amp-coslr-400e_in1k.py data/milan_cache --epochs 10
# 16 GPUs x 256 images: bash tools/dist_train.sh configs/milan/milan-cached_vit-base-p16_16xb256-amp-coslr-400e_in1k.py 8
_base_ = './milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'

cache = 'data/milan_cache'

train_dataloader = dict(
    sampler=dict(crops=10),
    dataset=dict(
        pipeline=[
            dict(type='mmmilan.LoadRandomResizedCrop', scale=224, crop_ratio_range=(0.2, 1.0), flip_prob=0.5),
            dict(type='mmmilan.LoadImportance', cache=cache),
            dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75),
            dict(type='PackInputs'),
        ],
    ),
)

default_hooks = dict(teacher_cache=dict(type='mmmilan.TeacherCacheHook', cache=cache))
