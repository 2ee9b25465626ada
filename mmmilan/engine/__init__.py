from mmmilan.engine.hooks import CorruptImageHook, NonFiniteLossHook, StepSeedHook
from mmmilan.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmmilan.engine.metrics import ReconstructionLoss
from mmmilan.engine.optim import BFloat16OptimWrapper

__all__ = [
    'BFloat16OptimWrapper',
    'CorruptImageHook',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteLossHook',
    'ReconstructionLoss',
    'StepSeedHook',
]
