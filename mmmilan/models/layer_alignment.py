"""MaskAlign: no decoder, layers of the encoder are aligned with layers of the teacher (arXiv 2211.08887)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmmilan.models.targets import Target
from mmmilan.models.vit import init_linear
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher


@MODELS.register_module()
class LayerAlignment(Target):
    """Layer-normed tokens of the teacher's top layers, at the class token and the visible patches: 2 · smooth L1.

    The target is the layers side by side; with :class:`LayerMixture` as the neck, the loss is the mean over layers of
    twice the mean smooth L1 loss, as in the published code (``loss_weights='top2'``, ``target_norm='whiten'``).

    Args:
        teacher: Config or name of a teacher.
        num_layers: Number L of the teacher's last layers to align with.
    """

    def __init__(self, teacher: dict | str | Teacher, num_layers: int = 2, init_cfg: dict | None = None) -> None:
        super().__init__(teacher, init_cfg)
        self.layers = list(range(-num_layers, 0))
        self.feature_dim = num_layers * self.teacher.width

    def call_teacher(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> normed tokens of the layers side by side [B, 1 + N, L·W], importance [B, N]."""
        tokens, importance = self.teacher.forward_layers(images, self.layers)
        return torch.cat([F.layer_norm(x, x.shape[-1:]) for x in tokens], dim=-1), importance

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        return 2 * F.smooth_l1_loss(pred.float(), target.float(), reduction='none').mean(-1)

    def loss_tokens(self, num_visible: int) -> slice:
        return slice(1 + num_visible)


@MODELS.register_module()
class LayerMixture(BaseModule):
    """No decoder: for each of L layers of the teacher a learned sum of S layers of the encoder, and a linear layer.

    The encoder gives its layers by ``out_indices``.

    Args:
        embed_dim: Width D of the encoder.
        num_layers: Number S of layers that the encoder gives.
        num_targets: Number L of layers of the teacher.
        predict_feature_dim: Width of the target: L times that of the teacher's tokens.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_layers: int = 12,
        num_targets: int = 2,
        predict_feature_dim: int = 1536,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.embed_dim = embed_dim
        self.num_layers = num_layers
        self.predict_feature_dim = predict_feature_dim
        self.weights = nn.Parameter(torch.empty(num_targets, num_layers))
        self.heads = nn.ModuleList(nn.Linear(embed_dim, predict_feature_dim // num_targets) for _ in range(num_targets))

    def init_weights(self) -> None:
        """Linear layers as MAE's, and equal parts of the layers (published code)."""
        self.apply(init_linear)
        nn.init.constant_(self.weights, 1 / self.num_layers)
        super().init_weights()

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """latent [S, B, 1 + V, D] -> predictions [B, 1 + V, C]; the indices are not needed."""
        mixtures = torch.einsum('ts,sbnd->tbnd', self.weights, latent)
        return torch.cat([head(mixture) for head, mixture in zip(self.heads, mixtures, strict=True)], dim=-1)
