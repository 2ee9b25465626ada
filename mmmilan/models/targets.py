"""What a masked model predicts, and how its predictions are compared with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, ModuleList
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.models.wrapping import Frozen
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher, build_teacher


class Target(BaseModule):
    """Base of the heads.

    A new target is a subclass with three methods: ``target``, ``token_loss`` and ``loss_tokens``.

    Args:
        teacher: Config or name of a :class:`Teacher`, or a teacher, or None. It is frozen and not in the state dict.

    Attributes:
        feature_dim: Width C of the target.
        cls_weight: Weight of the class token in the mean; a patch has 1.
        recalled: What the teacher gives of the images of this step, if it is known (``TeacherCacheHook``).
    """

    feature_dim: int
    cls_weight: float = 1.0
    recalled: tuple[Tensor, Tensor] | None = None

    def __init__(self, teacher: dict | str | Teacher | None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self._teacher = Frozen(build_teacher(teacher)) if teacher is not None else None

    @property
    def teacher(self) -> Teacher | None:
        return self._teacher.module if self._teacher else None

    def take_images(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell the teacher how its images come normalised: mean and standard deviation of RGB in [0, 1]."""
        if self.teacher is not None:
            self.teacher.take_images(mean, std)

    def run_teacher(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Images [B, 3, H, W] -> the teacher's features [B, 1 + N, C] and importance [B, N]; None without one."""
        if self.recalled is not None:
            features, importance = self.recalled
            return features[: len(images)], importance[: len(images)]  # a measurement may take the first of them
        if self._teacher is None:
            return None, None
        if next(self.teacher.parameters(), images).device != images.device:
            self.teacher.to(images.device)  # FSDP moves nothing but the parameters that it shards
        return self.call_teacher(images)

    def call_teacher(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> the features that this target needs [B, 1 + N, C], and importance [B, N]."""
        return self._teacher(images)

    def target(self, images: Tensor, features: Tensor | None) -> Tensor:
        """Images [B, 3, H, W] and the teacher's features [B, 1 + N, C] -> target [B, 1 + N, C]."""
        return features

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Loss of each token: [B, T, C], [B, T, C] -> [B, T], float32."""
        raise NotImplementedError

    def loss_tokens(self, num_visible: int) -> slice:
        """The tokens, out of [class token, visible, masked], over which the loss is the mean."""
        raise NotImplementedError

    def compare(self, pred: Tensor, target: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
        """Loss of each token, and of each image: the weighted mean over the tokens of ``loss_tokens``.

        Args:
            pred: Predictions [B, T, C]: class token, visible patches, masked patches.
            target: Targets in the same order.
            num_visible: Number of visible patches.

        Returns:
            Losses [B, T] and [B], float32.
        """
        token_loss = self.token_loss(pred, target)
        weight = torch.ones_like(token_loss[0])
        weight[0] = self.cls_weight
        tokens = self.loss_tokens(num_visible)
        return token_loss, (token_loss[:, tokens] * weight[tokens]).sum(1) / weight[tokens].sum()


@MODELS.register_module()
class CLIPTarget(Target):
    """Features of a frozen teacher: || p/|p| - t/|t| ||² = 2 - 2 cos(p, t) (paper, eq. 1).

    Args:
        teacher: Config or name of a teacher.
        cls_token: Count the class token in the mean (published code); False leaves it to patches (paper), a number
            counts it as that many patches.

    Raises:
        InputError: that number is negative or not finite.
    """

    def __init__(self, teacher: dict | str | Teacher, cls_token: float = True, init_cfg: dict | None = None) -> None:
        super().__init__(teacher, init_cfg)
        if not 0 <= cls_token < math.inf:
            raise InputError(f'head.cls_token={cls_token} is no weight; give a number from 0 on.')
        self.cls_weight = float(cls_token)
        self.feature_dim = self.teacher.feature_dim

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        pred, target = F.normalize(pred.float(), dim=-1), F.normalize(target.float(), dim=-1)
        return 2 - 2 * (pred * target).sum(-1)

    def loss_tokens(self, num_visible: int) -> slice:
        return slice(None)


@MODELS.register_module()
class PixelTarget(Target):
    """Pixels of the masked patches (MAE): mean squared error.

    Args:
        norm_pix: Normalise each target patch by its own mean and standard deviation.
        patch_size: Side of a patch in pixels.
        teacher: Config or name of a teacher, needed only for semantic-aware masking.
    """

    def __init__(
        self,
        norm_pix: bool = False,
        patch_size: int = 16,
        teacher: dict | str | Teacher | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(teacher, init_cfg)
        self.norm_pix = norm_pix
        self.patch_size = patch_size
        self.feature_dim = 3 * patch_size**2

    @torch.no_grad()
    def target(self, images: Tensor, features: Tensor | None) -> Tensor:
        size = self.patch_size
        patches = images.unflatten(2, (-1, size)).unflatten(4, (-1, size))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        if self.norm_pix:
            var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            patches = (patches - mean) / (var + 1e-6).sqrt()
        return F.pad(patches, (0, 0, 1, 0))  # zeros stand for the class token, which has no loss

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.float() - target.float()).square().mean(-1)

    def loss_tokens(self, num_visible: int) -> slice:
        return slice(1 + num_visible, None)


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

    def take_images(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell all teachers how their images come normalised, see :meth:`Target.take_images`."""
        for target in self.targets:
            target.take_images(mean, std)

    def run_teacher(self, images: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
        """Images [B, 3, H, W] -> features of each target's teacher, and the first importance [B, N]."""
        features, importances = zip(*[target.run_teacher(images) for target in self.targets], strict=True)
        return list(features), next((importance for importance in importances if importance is not None), None)

    def target(self, images: Tensor, features: list[Tensor | None]) -> Tensor:
        """The targets side by side [B, 1 + N, C]."""
        parts = zip(self.targets, features, strict=True)
        return torch.cat([target.target(images, part).float() for target, part in parts], dim=-1)

    def compare(self, pred: Tensor, target: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
        """The weighted sums of what the targets give, see :meth:`Target.compare`."""
        sums = torch.zeros((), device=pred.device), torch.zeros((), device=pred.device)
        parts = pred.split(self.feature_dims, dim=-1), target.split(self.feature_dims, dim=-1)
        for head, weight, prediction, wanted in zip(self.targets, self.weights, *parts, strict=True):
            losses = head.compare(prediction, wanted, num_visible)
            if self.balance:
                weight = weight / spread(head, wanted, num_visible)
            sums = tuple(total + weight * loss for total, loss in zip(sums, losses, strict=True))
        return sums


@torch.no_grad()
def spread(head: Target, target: Tensor, num_visible: int) -> Tensor:
    """φ²: the loss, a scalar, of predicting the mean over the tokens that count of targets [B, T, C]."""
    mean = target[:, head.loss_tokens(num_visible)].mean((0, 1))
    return head.compare(mean.expand_as(target), target, num_visible)[1].mean()
