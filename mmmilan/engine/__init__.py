from mmmilan.engine.clip_evaluation import RetrievalRecall, ZeroShotLoop
from mmmilan.engine.distributed import ZeroCheckpointHook, ZeroRedundancyOptimizer
from mmmilan.engine.hooks import (
    ClassCountHook,
    CorruptImageHook,
    ExactLoadingHook,
    MainLoggerHook,
    NonFiniteLossHook,
    StepSeedHook,
)
from mmmilan.engine.knn import KNNLoop
from mmmilan.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmmilan.engine.mean_teacher import MeanTeacherHook
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
    'MainLoggerHook',
    'MeanTeacherHook',
    'NonFiniteLossHook',
    'ReconstructionLoss',
    'RetrievalRecall',
    'StepSeedHook',
    'ThroughputHook',
    'ZeroCheckpointHook',
    'ZeroRedundancyOptimizer',
    'ZeroShotLoop',
]
