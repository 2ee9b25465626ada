from mmmilan.engine.checkpointing import CheckpointHook
from mmmilan.engine.class_names import ClassCountHook
from mmmilan.engine.compilation import CompileHook
from mmmilan.engine.distributed import FullyShardStrategy, GradientCompressionHook
from mmmilan.engine.heartbeat import HeartbeatHook
from mmmilan.engine.image_checks import CorruptImageHook, ImageSizeHook
from mmmilan.engine.log import ConsoleRunner, DeferredRuntimeInfoHook, MainLoggerHook
from mmmilan.engine.loops import EpochLoop, PrefetchHook, StepSeedHook
from mmmilan.engine.mean_teacher import MeanTeacherHook
from mmmilan.engine.non_finite import NonFiniteLossHook
from mmmilan.engine.online_evaluation import OnlineEvaluationHook
from mmmilan.engine.optim import (
    LARS,
    BFloat16OptimWrapper,
    GroupingOptimWrapperConstructor,
    LayerDecayOptimWrapperConstructor,
)
from mmmilan.engine.resuming import ExactLoadingHook
from mmmilan.engine.schedule import ScheduleCheckHook
from mmmilan.engine.stopping import StopHook
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
    'StepSeedHook',
    'StopHook',
    'ThroughputHook',
]
