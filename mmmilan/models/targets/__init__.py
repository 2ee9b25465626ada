from mmmilan.models.targets.base import Target
from mmmilan.models.targets.clip import CLIPTarget
from mmmilan.models.targets.distillation import CodewordTarget, FeatureTarget
from mmmilan.models.targets.layer_alignment import LayerAlignment, LayerMixture
from mmmilan.models.targets.pixels import PixelTarget
from mmmilan.models.targets.sum import SumTarget

__all__ = [
    'CLIPTarget',
    'CodewordTarget',
    'FeatureTarget',
    'LayerAlignment',
    'LayerMixture',
    'PixelTarget',
    'SumTarget',
    'Target',
]
