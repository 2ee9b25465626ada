# Retrieval between the 1000 test images of Flickr30k and their 5000 captions. Nothing is trained.
# python tools/test.py configs/maskclip/benchmarks/maskclip_vit-base-p16_retrieval_flickr30k.py CHECKPOINT
_base_ = '../maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmmilan.CaptionedImages',
        data_root='data/flickr30k/images',
        captions='data/flickr30k/captions_test.csv',
        on_corrupt='raise',
        pipeline=[
            dict(type='mmmilan.LoadImage'),
            dict(type='ResizeEdge', scale=224, edge='short', backend='pillow', interpolation='bicubic'),
            dict(type='CenterCrop', crop_size=224),
            dict(type='mmmilan.TokenizeCaption', context_length=77, all_captions=True),
            dict(type='PackInputs', algorithm_keys=('text',)),
        ],
    )
)
test_evaluator = dict(_delete_=True, type='mmmilan.RetrievalRecall')
test_cfg = dict(_delete_=True)
