"""MILAN: masked image pretraining on language assisted representation (paper, figure 1).

images ──► teacher (frozen CLIP) ──► features t [B, 1+N, C], importance s [B, N]
  │                                        │                      │
  │                                        │                    draw: V of N patches without replacement, p ∝ s
  │                                        │                      │
  ├───────────────── visible [B, V] ◄──────┼──────────────────────┤
  ▼                                        │                      ▼
encoder (ViT) ──► z [B, 1+V, D] ──► decoder ◄────────────── masked [B, N-V]
                                    │      │
                    p [B, 1+N, C] ◄─┘      │
                          │                │
                          └─────► head ◄───┘   loss: mean over tokens of || p/|p| - t/|t| ||²
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mmengine.model import BaseModel
from mmpretrain.structures import DataSample
from torch import Tensor

from mmmilan.masking import split_patches, supplied_masks
from mmmilan.models.fitting import check_parts
from mmmilan.models.tokens import gather_tokens
from mmmilan.registry import MODELS, TRANSFORMS


@dataclass
class Reconstruction:
    """One masked forward pass.

    Attributes:
        visible: Indices [B, V] of the visible patches, in image order.
        masked: Indices [B, N - V] of the masked patches, in image order.
        token_loss: Loss [B, T] of the predicted tokens: class token, visible patches, masked patches.
        loss: The training loss, a scalar.
        importance: Attention of the teacher's class token to each patch [B, N]; None without a teacher.
    """

    visible: Tensor
    masked: Tensor
    token_loss: Tensor
    loss: Tensor
    importance: Tensor | None


@MODELS.register_module()
class MILAN(BaseModel):
    """Predict a teacher's features of all patches from the few that are visible.

    MAE and knowledge distillation are the same algorithm with other parts (paper, tables 5 and 10).

    Args:
        backbone: Config of the encoder, a :class:`MILANViT`.
        masking: Config of ``SemanticAwareMasking`` or ``RandomMasking``.
        neck: Config of the decoder.
        head: Config of the target and its loss.
        data_preprocessor: Config of the normalisation of images.

    Raises:
        InputError: two parts do not fit each other.
    """

    def __init__(
        self,
        backbone: dict,
        masking: dict,
        neck: dict,
        head: dict,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        self.masking = TRANSFORMS.build(masking)
        self.neck = MODELS.build(neck)
        self.head = MODELS.build(head)
        check_parts(self.backbone, self.masking, self.neck, self.head, self.head.feature_dim)

    def forward(
        self, inputs: Tensor, data_samples: list[DataSample] | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | list[DataSample] | tuple[Tensor, ...]:
        """MMEngine's entry: 'loss' trains, 'predict' gives what a figure needs, 'tensor' gives features."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        return self.extract_feat(inputs)

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Features of whole images [B, 3, H, W], as the backbone's ``out_type`` asks."""
        return self.backbone(inputs)

    def loss(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> dict[str, Tensor]:
        """Training loss of normalised images [B, 3, H, W].

        ``data_sample.mask`` (bool [N], True = masked) is used where the pipeline supplied one.
        """
        return dict(loss=self.reconstruct(inputs, data_samples).loss)

    def reconstruct(self, images: Tensor, data_samples: list[DataSample] | None = None) -> Reconstruction:
        """The algorithm, in the steps of the drawing at the top of this file."""
        features, importance = self.head.run_teacher(images)  # t [B, 1+N, C], s [B, N]
        visible, masked = self.draw(images, importance, data_samples)  # [B, V], [B, N-V]

        latent = self.backbone(images, visible)  # z [B, 1+V, D]
        pred = self.neck(latent, visible, masked)  # p [B, 1+N, C]: class token, visible, masked

        target = self.head.target(images, features)  # [B, 1+N, C]: class token, patches in image order
        order = torch.cat([visible, masked], dim=1)[:, : pred.shape[1] - 1]  # without a decoder, visible alone
        target = torch.cat([target[:, :1], gather_tokens(target[:, 1:], order)], dim=1)  # in the order of p
        token_loss = self.head.token_loss(pred, target)  # [B, 1+N]
        loss = token_loss[:, self.head.loss_tokens(visible.shape[1])].mean()
        return Reconstruction(visible, masked, token_loss, loss, importance)

    def draw(
        self, images: Tensor, importance: Tensor | None, data_samples: list[DataSample] | None
    ) -> tuple[Tensor, Tensor]:
        """Visible [B, V] and masked [B, N - V] patches: those of the data pipeline's masks, else drawn here."""
        num_patches = self.backbone.num_patches
        mask = supplied_masks(data_samples, num_patches)
        if mask is not None:
            return split_patches(mask, int((~mask[0]).sum()))
        mask = self.masking.draw(importance, (len(images), num_patches), images.device)
        return split_patches(mask, self.masking.num_visible(num_patches))

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> list[DataSample]:
        """What a figure needs, set on each data sample.

        ``mask`` [N] (True = masked), ``patch_loss`` [N] (NaN where nothing is predicted), ``importance`` [N] (with a
        teacher) and the image's ``loss``.
        """
        result = self.reconstruct(inputs, data_samples)
        order, token_loss = torch.cat([result.visible, result.masked], dim=1), result.token_loss
        mask = torch.ones_like(order, dtype=torch.bool).scatter_(1, result.visible, False)
        patch_loss = token_loss.new_full(order.shape, torch.nan)
        patch_loss.scatter_(1, order[:, : token_loss.shape[1] - 1], token_loss[:, 1:])
        image_loss = token_loss[:, self.head.loss_tokens(result.visible.shape[1])].mean(dim=1)
        data_samples = data_samples or [DataSample() for _ in inputs]
        for i, sample in enumerate(data_samples):
            sample.set_mask(mask[i])
            sample.set_field(patch_loss[i], 'patch_loss')
            sample.set_field(image_loss[i], 'loss')
            if result.importance is not None:
                sample.set_field(result.importance[i], 'importance')
        return data_samples
