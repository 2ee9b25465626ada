from mmmilan.engine.checkpointing import CheckpointHook
from mmmilan.engine.compilation import CompileHook
from mmmilan.engine.data_checks import ClassCountHook, CorruptImageHook, ImageSizeHook
from mmmilan.engine.distributed import FullyShardStrategy, GradientCompressionHook
from mmmilan.engine.log import ConsoleRunner, DeferredRuntimeInfoHook, MainLoggerHook
from mmmilan.engine.loops import EpochLoop, PrefetchHook, SeveralViewsHook, StepSeedHook
from mmmilan.engine.non_finite import NonFiniteLossHook
from mmmilan.engine.online_evaluation import OnlineEvaluationHook
from mmmilan.engine.optim import (
    LARS,
    BFloat16OptimWrapper,
    GroupingOptimWrapperConstructor,
    LayerDecayOptimWrapperConstructor,
    MeanTeacherHook,
)
from mmmilan.engine.resuming import ExactLoadingHook
from mmmilan.engine.schedule import ScheduleCheckHook
from mmmilan.engine.stopping import HeartbeatHook, StopHook
from mmmilan.engine.teacher_cache import TeacherCacheHook
from mmmilan.engine.throughput import ThroughputHook

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
    'HeartbeatHook',
    'ImageSizeHook',
    'LARS',
    'LayerDecayOptimWrapperConstructor',
    'MainLoggerHook',
    'MeanTeacherHook',
    'NonFiniteLossHook',
    'OnlineEvaluationHook',
    'PrefetchHook',
    'ScheduleCheckHook',
    'SeveralViewsHook',
    'StepSeedHook',
    'StopHook',
    'TeacherCacheHook',
    'ThroughputHook',
]
