from mmmilan.evaluation.metrics import ImageNetSubsetAccuracy, ReconstructionLoss, RetrievalRecall, iou_metric
from mmmilan.evaluation.probes import KNNLoop
from mmmilan.evaluation.zero_shot import ZeroShotLoop

__all__ = ['ImageNetSubsetAccuracy', 'KNNLoop', 'ReconstructionLoss', 'RetrievalRecall', 'ZeroShotLoop', 'iou_metric']
