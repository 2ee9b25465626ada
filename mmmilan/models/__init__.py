from mmmilan.models.clip import CLIP
from mmmilan.models.decoders import LinearProjection, MAEDecoder, PromptingDecoder
from mmmilan.models.dense_vit import DenseViT
from mmmilan.models.milan import MILAN
from mmmilan.models.probing import SemanticAwareViT
from mmmilan.models.targets import CLIPTarget, PixelTarget
from mmmilan.models.teachers import OpenCLIPTeacher, TimmTeacher
from mmmilan.models.vit import MILANViT

__all__ = [
    'CLIP',
    'CLIPTarget',
    'DenseViT',
    'LinearProjection',
    'MAEDecoder',
    'MILAN',
    'MILANViT',
    'OpenCLIPTeacher',
    'PixelTarget',
    'PromptingDecoder',
    'SemanticAwareViT',
    'TimmTeacher',
]
