"""MMSegmentation's metric, which says what it is a mean of. This file imports mmseg."""

from __future__ import annotations

from mmseg.evaluation import IoUMetric as MMSegIoUMetric

from mmmilan.datasets.classes import listed, warn
from mmmilan.errors import InputError


class IoUMetric(MMSegIoUMetric):
    """See :func:`mmmilan.evaluation.metrics.iou_metric`."""

    def compute_metrics(self, results: list) -> dict[str, float]:
        if not self.format_only:
            self.check_labels(sum(labels for *_, labels in results).tolist())
        return super().compute_metrics(results)

    def check_labels(self, pixels: list[float]) -> None:
        """Say which classes have no pixel.

        Args:
            pixels: Labelled pixels of each class.

        Raises:
            InputError: no class has one.
        """
        classes = self.dataset_meta['classes']
        lacking = [name for name, count in zip(classes, pixels, strict=True) if not count]
        if len(lacking) == len(classes):
            raise InputError('No pixel of the label maps has a class, so there is nothing to score; check the maps.')
        if lacking:
            rest = [name for name in classes if name not in lacking]
            warn(
                f'The scores are of {len(rest)} of {len(classes)} classes ({listed(rest)}): no pixel of the label maps '
                f'has one of the others ({listed(lacking)}).'
            )
