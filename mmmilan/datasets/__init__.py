from mmmilan.datasets.annotations import LoadLabelMap
from mmmilan.datasets.captions import CaptionedImages, CaptionedShards, TokenizeCaption
from mmmilan.datasets.coco import coco_dataset
from mmmilan.datasets.crops import LoadRandomResizedCrop
from mmmilan.datasets.decoding import CorruptImageError, LoadImage
from mmmilan.datasets.image_folder import ImageFolder, ImageSources
from mmmilan.datasets.packed import ShardSampler
from mmmilan.datasets.reproducible import Draw, ReproducibleSampler
from mmmilan.datasets.split_file import LabelledImages

__all__ = [
    'CaptionedImages',
    'CaptionedShards',
    'CorruptImageError',
    'Draw',
    'ImageFolder',
    'ImageSources',
    'LabelledImages',
    'LoadImage',
    'LoadLabelMap',
    'LoadRandomResizedCrop',
    'ReproducibleSampler',
    'ShardSampler',
    'TokenizeCaption',
    'coco_dataset',
]
