"""Several targets at once: several teachers, or features and pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.model import ModuleList
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.models.targets.base import Target
from mmmilan.models.teachers import Teacher
from mmmilan.registry import MODELS


@MODELS.register_module()
class SumTarget(Target):
    """The weighted sum of targets, predicted side by side by one decoder: Σ w_i · loss_i / φ_i².

    φ_i² is the loss of predicting the mean target of the batch. So each term is the share of its target's variation
    that is not predicted, whatever the target's scale. For a squared error φ_i² = tr(Σ_i) / C_i, Σ_i being
    the covariance of the target over tokens: φ is the scalar by which PHI-S divides a teacher's features (arXiv
    2410.01680). PHI-S rotates them too, on which a squared error does not depend. Each process has the φ of its batch.

    Semantic-aware masking uses the importance of the first target that has a teacher. The weight of the class token is
    an option of each target (``CLIPTarget(cls_token=2.0)``).

    Args:
        targets: Configs of the targets.
        weights: Their weights w, by default 1.
        balance: Divide by φ²; False adds the losses as they are.

    Raises:
        InputError: the weights are not as many as the targets, or the teachers' grids differ.
    """

    def __init__(
        self,
        targets: Sequence[dict],
        weights: Sequence[float] | None = None,
        balance: bool = True,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(None, init_cfg)
        self.targets = ModuleList(MODELS.build(target) for target in targets)
        self.weights = list(weights or [1.0] * len(targets))
        self.balance = balance
        self.feature_dims = [target.feature_dim for target in self.targets]
        self.feature_dim = sum(self.feature_dims)
        if len(self.weights) != len(self.targets):
            raise InputError(
                f'head.weights has {len(self.weights)} numbers for {len(self.targets)} targets; give each target one.'
            )
        grids = [target.teacher.num_patches for target in self.targets if target.teacher is not None]
        if len(set(grids)) > 1:
            raise InputError(f'The teachers of head.targets see {grids} patches; set their input_size to agree.')

    @property
    def teacher(self) -> Teacher | None:
        """The first target's that has one."""
        return next((target.teacher for target in self.targets if target.teacher is not None), None)

    def run_teacher(self, images: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
        """Images [B, 3, H, W] -> features of each target's teacher, and the first importance [B, N]."""
        features, importances = zip(*[target.run_teacher(images) for target in self.targets], strict=True)
        return list(features), next((importance for importance in importances if importance is not None), None)

    def target(self, images: Tensor, features: list[Tensor | None]) -> Tensor:
        """The targets side by side [B, 1 + N, C]."""
        parts = zip(self.targets, features, strict=True)
        return torch.cat([target.target(images, part).float() for target, part in parts], dim=-1)

    def compare(self, pred: Tensor, target: Tensor, num_visible: int, num_masked: int) -> tuple[Tensor, Tensor]:
        """The weighted sums of what the targets give, see :meth:`Target.compare`."""
        sums = torch.zeros((), device=pred.device), torch.zeros((), device=pred.device)
        parts = pred.split(self.feature_dims, dim=-1), target.split(self.feature_dims, dim=-1)
        for head, weight, prediction, wanted in zip(self.targets, self.weights, *parts, strict=True):
            losses = head.compare(prediction, wanted, num_visible, num_masked)
            if self.balance:
                weight = weight / spread(head, wanted, num_visible, num_masked)
            sums = tuple(total + weight * loss for total, loss in zip(sums, losses, strict=True))
        return sums


@torch.no_grad()
def spread(head: Target, target: Tensor, num_visible: int, num_masked: int) -> Tensor:
    """φ²: the loss, a scalar, of predicting the mean over the tokens that count of targets [B, T, C]."""
    mean = target[:, head.loss_tokens(num_visible)].mean((0, 1))
    return head.compare(mean.expand_as(target), target, num_visible, num_masked)[1].mean()
