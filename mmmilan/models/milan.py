"""MILAN: masked image pretraining on language assisted representation (paper, figure 1).

images ──► teacher (frozen CLIP) ──► features t [B, 1+N, C], importance s [B, N]
  │                                        │                      │
  │                                        │                    draw: V of N patches without replacement, in
  │                                        │                      │   proportion to s
  ├───────────────── visible [B, V] ◄──────┼──────────────────────┤
  ▼                                        │                      ▼
encoder (ViT) ──► z [B, 1+V, D] ──► decoder ◄────────────── masked [B, N-V]
                                    │      │
                    p [B, 1+N, C] ◄─┘      │
                          │                │
                          └─────► head ◄───┘   loss: mean over tokens of || p/|p| - t/|t| ||²

``MILAN.reconstruct`` is this drawing, step by step. With K masks an image, B·K stands for B behind the draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmpretrain.structures import DataSample
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.models.fitting import check_parts
from mmmilan.models.masking import split_patches, supplied_masks
from mmmilan.models.targets import CLIPTarget
from mmmilan.models.vit import gather_tokens
from mmmilan.registry import MODELS, TRANSFORMS
from mmmilan.teachers.base import TextTower, statistics_of


@dataclass
class Reconstruction:
    """One masked forward pass of B images with K masks each; the rows of an image stand together.

    Attributes:
        visible: Indices [B·K, V] of the visible patches, in image order.
        predicted: Indices [B·K, M] of the masked patches that were predicted.
        token_loss: Loss [B·K, 1 + V + M] of the predicted tokens: class token, visible patches, masked patches.
        view_loss: Loss [B·K] of each image and mask; the training loss is its mean.
        importance: Importance [B, N] of each patch, from which the masks are drawn; None without a teacher.
    """

    visible: Tensor
    predicted: Tensor
    token_loss: Tensor
    view_loss: Tensor
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
        masks_per_image: Masks K that are drawn for an image in training. The teacher and the data pipeline see the
            image once; the loss is the mean over masks (data2vec 2.0, arXiv 2212.07525, section 3.2).
        data_preprocessor: Config of the normalisation of images.

    Raises:
        InputError: two parts do not fit each other, or ``masks_per_image`` is less than 1.
    """

    compiled_parts = ('mean_loss',)  # by CompileHook

    def __init__(
        self,
        backbone: dict,
        masking: dict,
        neck: dict,
        head: dict,
        masks_per_image: int = 1,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        if masks_per_image < 1:
            raise InputError(f'masks_per_image={masks_per_image} leaves nothing to learn from; choose 1 or more.')
        self.masks_per_image = masks_per_image
        self.backbone = MODELS.build(backbone)
        self.masking = TRANSFORMS.build(masking)
        self.neck = MODELS.build(neck)
        self.head = MODELS.build(head)
        check_parts(self.backbone, self.masking, self.neck, self.head, self.head.feature_dim)
        self.head.take_images(*statistics_of(data_preprocessor))

    def forward(
        self, inputs: Tensor, data_samples: list[DataSample] | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | list[DataSample] | tuple[Tensor, ...]:
        """MMEngine's entry: 'loss' trains, 'predict' gives what a figure needs, 'tensor' gives features."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        return self.extract_feat(inputs)

    def loss(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> dict[str, Tensor]:
        """Training loss of normalised images [B, 3, H, W].

        ``data_sample.mask`` (bool [N], True = masked) is used where the pipeline supplied one.
        """
        patches = self.supplied_patches(data_samples, self.masks_per_image)
        return dict(loss=self.mean_loss(inputs, patches))

    def mean_loss(self, images: Tensor, patches: tuple[Tensor, Tensor] | None) -> Tensor:
        """The training loss, a scalar; ``CompileHook`` compiles it as one."""
        return self.reconstruct(images, patches, self.masks_per_image).view_loss.mean()

    def reconstruct(
        self, images: Tensor, patches: tuple[Tensor, Tensor] | None = None, masks_per_image: int = 1
    ) -> Reconstruction:
        """The algorithm, in the steps of the drawing at the top of this file, with K masks an image.

        Args:
            images: Normalised images [B, 3, H, W].
            patches: Visible and masked patches, see ``supplied_patches``; by default they are drawn.
            masks_per_image: Masks K that are drawn for an image.
        """
        features, importance = self.head.run_teacher(images)  # t [B, 1+N, C], s [B, N]
        visible, masked = patches or self.draw(images, importance, masks_per_image)  # [B·K, V], [B·K, N-V]
        predicted = self.neck.sample(masked)  # [B·K, M], the masked patches to predict, by default all

        latent = self.backbone(images, visible)  # z [B·K, 1+V, D]
        pred = self.neck(latent, visible, predicted)  # p [B·K, 1+V+M, C]: class token, visible, masked

        target = self.head.target(images, features)  # [B, 1+N, C]: t itself, or pixels; class token, patches
        order = F.pad(1 + torch.cat([visible, predicted], dim=1), (1, 0))  # of the tokens of p; 0 is the class token
        target = gather_tokens(target, order)  # [B·K, 1+V+M, C]
        token_loss, view_loss = self.head.compare(pred, target, visible.shape[1], masked.shape[1])
        return Reconstruction(visible, predicted, token_loss, view_loss, importance)

    def draw(self, images: Tensor, importance: Tensor | None, masks_per_image: int) -> tuple[Tensor, Tensor]:
        """Visible [B·K, V] and masked [B·K, N - V] patches, drawn by importance [B, N]."""
        num_patches = self.backbone.num_patches
        if importance is not None:
            importance = importance.repeat_interleave(masks_per_image, dim=0)
        mask = self.masking.draw(importance, (len(images) * masks_per_image, num_patches), images.device)
        return split_patches(mask, self.masking.num_visible(num_patches))

    def supplied_patches(
        self, data_samples: list[DataSample] | None, masks_per_image: int = 1
    ) -> tuple[Tensor, Tensor] | None:
        """Visible [B, V] and masked [B, N - V] patches of the masks of the data pipeline; None if it set none."""
        mask = supplied_masks(data_samples, self.backbone.num_patches, masks_per_image)
        if mask is None:
            return None
        return split_patches(mask.to(self.backbone.cls_token.device), int((~mask[0]).sum()))

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> list[DataSample]:
        """What a figure needs, set on each data sample.

        ``mask`` [N] (True = masked), ``patch_loss`` [N] (NaN where nothing is predicted), ``importance`` [N] (with a
        teacher) and the image's ``loss``.
        """
        result = self.reconstruct(inputs, self.supplied_patches(data_samples))
        shape, order = (len(inputs), self.backbone.num_patches), torch.cat([result.visible, result.predicted], dim=1)
        mask = torch.ones(shape, dtype=torch.bool, device=inputs.device).scatter_(1, result.visible, False)
        patch_loss = result.token_loss.new_full(shape, torch.nan).scatter_(1, order, result.token_loss[:, 1:])
        data_samples = data_samples or [DataSample() for _ in inputs]
        for i, sample in enumerate(data_samples):
            sample.set_mask(mask[i])
            sample.set_field(patch_loss[i], 'patch_loss')
            sample.set_field(result.view_loss[i], 'loss')
            if result.importance is not None:
                sample.set_field(result.importance[i], 'importance')
        return data_samples

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Features of whole images [B, 3, H, W], as the backbone's ``out_type`` asks."""
        return self.backbone(inputs)

    # -- the joint space of image and text

    @property
    def has_joint_space(self) -> bool:
        """Whether tokens are predictions of a CLIP's features without passing the blocks of a decoder."""
        return isinstance(self.head, CLIPTarget) and hasattr(self.neck, 'project')

    def embed_joint(self, images: Tensor) -> Tensor:
        """The prediction of the teacher's features with nothing masked: images and texts share this space.

        Args:
            images: Whole normalised images [B, 3, H, W].

        Returns:
            Embeddings [B, 1 + N, C] of length 1, float32: the image's (class token), then those of its patches.

        Raises:
            InputError: see :meth:`project_joint`.
        """
        all_patches = torch.arange(self.backbone.num_patches, device=images.device).expand(len(images), -1)
        return self.project_joint(self.backbone(images, all_patches))

    def project_joint(self, latent: Tensor) -> Tensor:
        """The encoder's tokens [B, T, D] of whole images -> embeddings [B, T, C] of length 1, float32.

        Raises:
            InputError: the target is not a CLIP's features, or the decoder mixes the tokens in its blocks.
        """
        if not self.has_joint_space:
            parts = f'{type(self.neck).__name__} with {type(self.head).__name__}'
            raise InputError(
                f'{parts} has no joint space of image and text; train with a CLIPTarget and a PromptingDecoder or '
                'LinearProjection.'
            )
        return F.normalize(self.neck.project(latent).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> embeddings [B, C] in the joint space, of length 1, float32."""
        return self.embed_joint(images)[:, 0]

    def text_tower(self) -> TextTower:
        """The text tower of the teacher.

        Raises:
            InputError: there is no teacher, or it has none.
        """
        if self.head.teacher is None:
            raise InputError('This model has no teacher, and so no text tower; train it with an OpenCLIPTeacher.')
        return self.head.teacher.text_tower()
