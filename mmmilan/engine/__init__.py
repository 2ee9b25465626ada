from mmmilan.engine.checkpointing import CheckpointHook
from mmmilan.engine.compilation import CompileHook
from mmmilan.engine.console import ConsoleRunner
from mmmilan.engine.distributed import GradientCompressionHook
from mmmilan.engine.fsdp import FullyShardStrategy
from mmmilan.engine.hooks import (
    ClassCountHook,
    CorruptImageHook,
    ExactLoadingHook,
    ImageSizeHook,
    MainLoggerHook,
    NonFiniteLossHook,
    StepSeedHook,
)
from mmmilan.engine.lars import LARS
from mmmilan.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmmilan.engine.loops import EpochLoop
from mmmilan.engine.mean_teacher import MeanTeacherHook
from mmmilan.engine.online_evaluation import OnlineEvaluationHook
from mmmilan.engine.optim import BFloat16OptimWrapper, GroupingOptimWrapperConstructor
from mmmilan.engine.prefetching import PrefetchHook
from mmmilan.engine.schedule import ScheduleCheckHook
from mmmilan.engine.stopping import StopHook
from mmmilan.engine.throughput import DeferredRuntimeInfoHook, ThroughputHook

__all__ = [
    'BFloat16OptimWrapper',
    'CheckpointHook',
    'ClassCountHook',
    'CompileHook',
    'ConsoleRunner',
    'CorruptImageHook',
    'DeferredRuntimeInfoHook',
    'EpochLoop',
    'ExactLoadingHook',
    'FullyShardStrategy',
    'GradientCompressionHook',
    'GroupingOptimWrapperConstructor',
    'ImageSizeHook',
    'LARS',
    'LayerDecayOptimWrapperConstructor',
    'MainLoggerHook',
    'MeanTeacherHook',
    'NonFiniteLossHook',
    'OnlineEvaluationHook',
    'PrefetchHook',
    'ScheduleCheckHook',
    'StepSeedHook',
    'StopHook',
    'ThroughputHook',
]
