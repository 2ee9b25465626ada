"""What is predicted, and the loss (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmmilan.models.teachers import Teacher
from mmmilan.registry import MODELS


class Target(BaseModule):
    """Base of the heads: makes the target of an image and compares predictions with it.

    The teacher, where there is one, is kept out of ``parameters()``, ``state_dict()`` and ``train()``: it is
    never trained, never saved, always in eval mode. It does follow the model from device to device.

    Args:
        teacher: Config of a :class:`Teacher`, or a teacher, or None.
    """

    def __init__(self, teacher: dict | Teacher | None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if isinstance(teacher, dict):
            teacher = MODELS.build(teacher)
        # a tuple hides the module from nn.Module's bookkeeping
        self._teacher = (teacher.eval().requires_grad_(False),) if teacher is not None else ()

    @property
    def teacher(self) -> Teacher | None:
        return self._teacher[0] if self._teacher else None

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def run_teacher(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features [B, 1 + N, C] and importance [B, N]."""
        if next(self.teacher.parameters()).device != images.device:
            self.teacher.to(images.device)  # FSDP moves nothing but the parameters that it shards
        return self.teacher(images)

    def target(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] -> target [B, 1 + N, C] and, with a teacher, importance [B, N]."""
        raise NotImplementedError

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Loss of each token: [B, T, C], [B, T, C] -> [B, T], float32."""
        raise NotImplementedError

    def counted(self, num_visible: int) -> slice:
        """The tokens, out of [class token, visible, masked], over which the loss is the mean."""
        raise NotImplementedError


@MODELS.register_module()
class CLIPTarget(Target):
    """Features of a frozen teacher: || p/|p| - t/|t| ||² = 2 - 2 cos(p, t) (paper, eq. 1).

    Args:
        teacher: Config of a teacher.
        cls_token: Count the class token in the mean (published code); False leaves it to patches (paper).
    """

    def __init__(self, teacher: dict | Teacher, cls_token: bool = True, init_cfg: dict | None = None) -> None:
        super().__init__(teacher, init_cfg)
        self.cls_token = cls_token
        self.feature_dim = self.teacher.feature_dim

    def target(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.run_teacher(images)

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        pred, target = F.normalize(pred.float(), dim=-1), F.normalize(target.float(), dim=-1)
        return 2 - 2 * (pred * target).sum(-1)

    def counted(self, num_visible: int) -> slice:
        return slice(0 if self.cls_token else 1, None)


@MODELS.register_module()
class PixelTarget(Target):
    """Pixels of the masked patches (MAE): mean squared error.

    Args:
        norm_pix: Normalise each target patch by its own mean and standard deviation.
        patch_size: Side of a patch in pixels.
        teacher: Config of a teacher, needed only for semantic aware masking.
    """

    def __init__(
        self,
        norm_pix: bool = False,
        patch_size: int = 16,
        teacher: dict | Teacher | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(teacher, init_cfg)
        self.norm_pix = norm_pix
        self.patch_size = patch_size
        self.feature_dim = 3 * patch_size**2

    @torch.no_grad()
    def target(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        size = self.patch_size
        patches = images.unflatten(2, (-1, size)).unflatten(4, (-1, size))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        if self.norm_pix:
            var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            patches = (patches - mean) / (var + 1e-6).sqrt()
        importance = self.run_teacher(images)[1] if self.teacher is not None else None
        return F.pad(patches, (0, 0, 1, 0)), importance  # zeros stand for the class token, not counted

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.float() - target.float()).square().mean(-1)

    def counted(self, num_visible: int) -> slice:
        return slice(1 + num_visible, None)
