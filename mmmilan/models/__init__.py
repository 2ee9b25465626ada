from mmmilan.models.decoders import LinearProjection, MAEDecoder, PromptingDecoder
from mmmilan.models.dense_vit import DenseViT
from mmmilan.models.layer_alignment import LayerAlignment, LayerMixture
from mmmilan.models.maskclip import MaskCLIP
from mmmilan.models.maskclip_losses import CodewordTarget, FeatureTarget, MaskedLanguageModel
from mmmilan.models.milan import MILAN
from mmmilan.models.preprocessors import (
    CaptionDataPreprocessor,
    ClassificationDataPreprocessor,
    PretrainingDataPreprocessor,
)
from mmmilan.models.semantic_aware_vit import SemanticAwareClassifier, SemanticAwareViT
from mmmilan.models.targets import CLIPTarget, PixelTarget, SumTarget, Target
from mmmilan.models.vit import MILANViT
from mmmilan.models.wrapping import MeanTeacher
from mmmilan.teachers import OpenCLIPTeacher, TimmTeacher

__all__ = [
    'CLIPTarget',
    'CaptionDataPreprocessor',
    'ClassificationDataPreprocessor',
    'CodewordTarget',
    'DenseViT',
    'FeatureTarget',
    'LayerAlignment',
    'LayerMixture',
    'LinearProjection',
    'MAEDecoder',
    'MILAN',
    'MILANViT',
    'MaskCLIP',
    'MaskedLanguageModel',
    'MeanTeacher',
    'OpenCLIPTeacher',
    'PixelTarget',
    'PretrainingDataPreprocessor',
    'PromptingDecoder',
    'SemanticAwareClassifier',
    'SemanticAwareViT',
    'SumTarget',
    'Target',
    'TimmTeacher',
]
