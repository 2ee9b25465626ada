"""MAE's target: the pixels of the masked patches (arXiv 2111.06377)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmilan.models.targets.base import Target
from mmmilan.models.teachers import Teacher
from mmmilan.registry import MODELS


@MODELS.register_module()
class PixelTarget(Target):
    """Pixels of the masked patches (MAE): mean squared error.

    Args:
        norm_pix: Normalise each target patch by its own mean and standard deviation.
        patch_size: Side of a patch in pixels.
        teacher: Config of a teacher, needed only for semantic-aware masking.
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
