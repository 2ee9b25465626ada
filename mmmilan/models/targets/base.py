"""What a masked model predicts, and how its predictions are compared with it."""

from __future__ import annotations

import torch
from mmengine.model import BaseModule
from mmpretrain.structures import DataSample
from torch import Tensor

from mmmilan.models.teachers import CachedTeacher, Teacher
from mmmilan.models.wrapping import Frozen
from mmmilan.registry import MODELS


class Target(BaseModule):
    """Base of the heads.

    A new target is a subclass with three methods: ``target``, ``token_loss`` and ``loss_tokens``.

    Args:
        teacher: Config of a :class:`Teacher`, or a teacher, or None. It is frozen and not in the state dict.

    Attributes:
        feature_dim: Width C of the target.
        cls_weight: Weight of the class token in the mean; a patch has 1.
    """

    feature_dim: int
    cls_weight: float = 1.0

    def __init__(self, teacher: dict | Teacher | None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if isinstance(teacher, dict):
            teacher = MODELS.build(teacher)
        self._teacher = Frozen(teacher) if teacher is not None else None

    @property
    def teacher(self) -> Teacher | None:
        return self._teacher.module if self._teacher else None

    def run_teacher(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Images [B, 3, H, W] -> the teacher's features [B, 1 + N, C] and importance [B, N]; None without one."""
        if self._teacher is None:
            return None, None
        if next(self.teacher.parameters(), images).device != images.device:
            self.teacher.to(images.device)  # FSDP moves nothing but the parameters that it shards
        return self.call_teacher(images)

    def call_teacher(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> the features that this target needs [B, 1 + N, C], and importance [B, N]."""
        return self._teacher(images)

    def cached_output(self, data_samples: list[DataSample] | None) -> tuple[Tensor, Tensor] | None:
        """The output of ``run_teacher`` that a :class:`CachedTeacher` finds in the data samples; else None."""
        return self.teacher.read(data_samples) if isinstance(self.teacher, CachedTeacher) else None

    def target(self, images: Tensor, features: Tensor | None) -> Tensor:
        """Images [B, 3, H, W] and the teacher's features [B, 1 + N, C] -> target [B, 1 + N, C]."""
        return features

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Loss of each token: [B, T, C], [B, T, C] -> [B, T], float32."""
        raise NotImplementedError

    def loss_tokens(self, num_visible: int) -> slice:
        """The tokens, out of [class token, visible, masked], over which the loss is the mean."""
        raise NotImplementedError

    def compare(self, pred: Tensor, target: Tensor, num_visible: int, num_masked: int) -> tuple[Tensor, Tensor]:
        """Loss of each token, and of each image and mask: the weighted mean over the tokens of ``loss_tokens``.

        Where M of the masked patches are predicted, each stands for num_masked / M of them. If they are drawn at
        random and predicted one by one, the expectation of the loss is that of all masked patches.

        Args:
            pred: Predictions [B, 1 + V + M, C]: class token, visible patches, masked patches.
            target: Targets in the same order.
            num_visible: Number V of visible patches.
            num_masked: Number of masked patches, of which M are predicted.

        Returns:
            Losses [B, 1 + V + M] and [B], float32.
        """
        token_loss = self.token_loss(pred, target)
        weight = torch.ones_like(token_loss[0])
        weight[0] = self.cls_weight
        weight[1 + num_visible :] = num_masked / max(1, len(weight) - 1 - num_visible)
        tokens = self.loss_tokens(num_visible)
        return token_loss, (token_loss[:, tokens] * weight[tokens]).sum(1) / weight[tokens].sum()
