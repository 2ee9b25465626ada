"""Evaluation of a pretraining model."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.evaluator import BaseMetric

from mmmilan.registry import METRICS


@METRICS.register_module()
class ReconstructionLoss(BaseMetric):
    """Mean over images of the pretraining loss, as ``MILAN.predict`` gives it."""

    default_prefix = 'reconstruction'

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        self.results.extend(float(sample['loss']) for sample in data_samples)

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return dict(loss=sum(results) / len(results))
