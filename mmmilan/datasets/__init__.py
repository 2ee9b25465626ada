from mmmilan.datasets.captions import CaptionedImages, CaptionedShards, ShardSampler, TokenizeCaption
from mmmilan.datasets.image_folder import CorruptImageError, ImageFolder, LoadImage
from mmmilan.datasets.random_resized_crop import LoadEncodedCrop, LoadRandomResizedCrop
from mmmilan.datasets.reproducible import Draw, ReproducibleSampler

__all__ = [
    'CaptionedImages',
    'CaptionedShards',
    'CorruptImageError',
    'Draw',
    'ImageFolder',
    'LoadEncodedCrop',
    'LoadImage',
    'LoadRandomResizedCrop',
    'ReproducibleSampler',
    'ShardSampler',
    'TokenizeCaption',
]
