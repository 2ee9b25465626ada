from mmmilan.engine.hooks import ClassCountHook, CorruptImageHook, ExactLoadingHook, NonFiniteLossHook, StepSeedHook
from mmmilan.engine.knn import KNNLoop
from mmmilan.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmmilan.engine.metrics import ImageNetSubsetAccuracy, ReconstructionLoss
from mmmilan.engine.optim import BFloat16OptimWrapper, GroupingOptimWrapperConstructor
from mmmilan.engine.throughput import DeferredRuntimeInfoHook, ThroughputHook

__all__ = [
    'BFloat16OptimWrapper',
    'ClassCountHook',
    'CorruptImageHook',
    'DeferredRuntimeInfoHook',
    'ExactLoadingHook',
    'GroupingOptimWrapperConstructor',
    'ImageNetSubsetAccuracy',
    'KNNLoop',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook',
    'ReconstructionLoss',
    'StepSeedHook',
    'ThroughputHook',
]
