from mmmilan.models.targets.base import Target
from mmmilan.models.targets.clip import CLIPTarget
from mmmilan.models.targets.distillation import CodewordTarget, FeatureTarget
from mmmilan.models.targets.pixels import PixelTarget

__all__ = ['CLIPTarget', 'CodewordTarget', 'FeatureTarget', 'PixelTarget', 'Target']
