# Zero-shot classification of any folder of classes, DATA_ROOT/CLASS/*, by the names of its folders. Nothing is trained.
# DATA_ROOT=data/food101/test python tools/test.py configs/maskclip/benchmarks/maskclip_vit-base-p16_zero-shot_custom.py CHECKPOINT
# The prompts are CLIP's for ImageNet; --cfg-options test_cfg.templates=food101.txt takes those of a text file, one a line,
# such as `a photo of {}, a type of food.`
_base_ = '../maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmmilan.ImageFolder',
        data_root='{{$DATA_ROOT:data/custom/val}}',
        with_label=True,
        pipeline={{_base_.test_dataloader.dataset.pipeline}},
    )
)
test_evaluator = dict(topk=(1,))
test_cfg = dict(class_names=None)
