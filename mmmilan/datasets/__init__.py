from mmmilan.datasets.image_folder import CorruptImageError, ImageFolder, LoadImage
from mmmilan.datasets.reproducible import Draw, ReproducibleSampler

__all__ = ['CorruptImageError', 'Draw', 'ImageFolder', 'LoadImage', 'ReproducibleSampler']
