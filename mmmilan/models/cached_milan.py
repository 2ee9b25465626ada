"""MILAN without its teacher, whose output comes with the images (docs/efficiency.md)."""

from __future__ import annotations

from typing import Any

from mmpretrain.structures import DataSample
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.models.milan import MILAN
from mmmilan.registry import MODELS
from mmmilan.teachers import CachedTeacher


@MODELS.register_module()
class CachedMILAN(MILAN):
    """MILAN on the images of :class:`mmmilan.teachers.CachedTargets`, with a :class:`CachedTeacher`.

    Raises:
        InputError: the teacher is another one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.head.teacher, CachedTeacher):
            raise InputError('A CachedMILAN has a cached teacher; set model.head.teacher.type=mmmilan.CachedTeacher.')

    def loss(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> dict[str, Tensor]:
        with self.head.teacher.giving(data_samples):
            return super().loss(inputs, data_samples)

    def predict(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> list[DataSample]:
        with self.head.teacher.giving(data_samples):
            return super().predict(inputs, data_samples)
