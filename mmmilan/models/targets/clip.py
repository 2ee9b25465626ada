"""MILAN's target: the features of a frozen teacher (paper, section 2.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmmilan.models.targets.base import Target
from mmmilan.models.teachers import Teacher
from mmmilan.registry import MODELS


@MODELS.register_module()
class CLIPTarget(Target):
    """Features of a frozen teacher: || p/|p| - t/|t| ||² = 2 - 2 cos(p, t) (paper, eq. 1).

    Args:
        teacher: Config of a teacher.
        cls_token: Count the class token in the mean (published code); False leaves it to patches (paper), a number
            counts it as that many patches.
    """

    def __init__(self, teacher: dict | Teacher, cls_token: float = True, init_cfg: dict | None = None) -> None:
        super().__init__(teacher, init_cfg)
        self.cls_weight = float(cls_token)
        self.feature_dim = self.teacher.feature_dim

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        pred, target = F.normalize(pred.float(), dim=-1), F.normalize(target.float(), dim=-1)
        return 2 - 2 * (pred * target).sum(-1)

    def loss_tokens(self, num_visible: int) -> slice:
        return slice(None)
