from mmmilan.evaluation.knn import KNNLoop
from mmmilan.evaluation.metrics import ImageNetSubsetAccuracy, ReconstructionLoss, iou_metric
from mmmilan.evaluation.retrieval import RetrievalRecall
from mmmilan.evaluation.zero_shot import ZeroShotLoop

__all__ = ['ImageNetSubsetAccuracy', 'KNNLoop', 'ReconstructionLoss', 'RetrievalRecall', 'ZeroShotLoop', 'iou_metric']
