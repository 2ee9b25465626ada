# Retrieval between the images of COCO val2014 and their captions, by mmpretrain's data set. Nothing is trained.
# python tools/test.py configs/maskclip/benchmarks/maskclip_vit-base-p16_retrieval_coco.py CHECKPOINT
_base_ = './maskclip_vit-base-p16_retrieval_flickr30k.py'

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmpretrain.COCORetrieval',
        data_root='data/coco',
        ann_file='annotations/captions_val2014.json',
        data_prefix=dict(img_path='val2014'),
        test_mode=True,
        pipeline={{_base_.test_dataloader.dataset.pipeline}},
    )
)
