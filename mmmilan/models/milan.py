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

``MILAN.reconstruct`` is this drawing, step by step.
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
    """One masked forward pass of B images.

    Attributes:
        visible: Indices [B, V] of the visible patches, in image order.
        predicted: Indices [B, T - 1] of the patches that were predicted, visible ones first.
        token_loss: Loss [B, T] of the predicted tokens: class token, then those patches.
        image_loss: Loss [B] of each image; the training loss is its mean.
        importance: Importance [B, N] of each patch, from which the masks are drawn; None without a teacher.
    """

    visible: Tensor
    predicted: Tensor
    token_loss: Tensor
    image_loss: Tensor
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

    compiled_parts = ('mean_loss',)  # by CompileHook

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
        return dict(loss=self.mean_loss(inputs, self.supplied_patches(data_samples)))

    def mean_loss(self, images: Tensor, patches: tuple[Tensor, Tensor] | None) -> Tensor:
        """The training loss, a scalar; ``CompileHook`` compiles it as one."""
        return self.reconstruct(images, patches).image_loss.mean()

    def reconstruct(self, images: Tensor, patches: tuple[Tensor, Tensor] | None = None) -> Reconstruction:
        """The algorithm, in the steps of the drawing at the top of this file.

        Args:
            images: Normalised images [B, 3, H, W].
            patches: Visible and masked patches, see ``supplied_patches``; by default they are drawn.
        """
        features, importance = self.head.run_teacher(images)  # t [B, 1+N, C], s [B, N]
        visible, masked = patches or self.draw(images, importance)  # [B, V], [B, N-V]

        latent = self.backbone(images, visible)  # z [B, 1+V, D]
        pred = self.neck(latent, visible, masked)  # p [B, T, C]: class token, visible, masked (T = 1+V without decoder)

        predicted = torch.cat([visible, masked], dim=1)[:, : pred.shape[1] - 1]
        target = self.head.target(images, features)  # [B, 1+N, C]: t itself, or pixels; class token, patches
        target = gather_tokens(target, F.pad(1 + predicted, (1, 0)))  # [B, T, C]; 0 is the class token
        token_loss, image_loss = self.head.compare(pred, target, visible.shape[1])
        return Reconstruction(visible, predicted, token_loss, image_loss, importance)

    def draw(self, images: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Visible [B, V] and masked [B, N - V] patches, drawn by importance [B, N]."""
        num_patches = self.backbone.num_patches
        mask = self.masking.draw(importance, (len(images), num_patches), images.device)
        return split_patches(mask, self.masking.num_visible(num_patches))

    def supplied_patches(self, data_samples: list[DataSample] | None) -> tuple[Tensor, Tensor] | None:
        """Visible [B, V] and masked [B, N - V] patches of the masks of the data pipeline; None if it set none."""
        mask = supplied_masks(data_samples, self.backbone.num_patches)
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
        shape = len(inputs), self.backbone.num_patches
        mask = torch.ones(shape, dtype=torch.bool, device=inputs.device).scatter_(1, result.visible, False)
        patch_loss = result.token_loss.new_full(shape, torch.nan).scatter_(
            1, result.predicted, result.token_loss[:, 1:]
        )
        data_samples = data_samples or [DataSample() for _ in inputs]
        for i, sample in enumerate(data_samples):
            sample.set_mask(mask[i])
            sample.set_field(patch_loss[i], 'patch_loss')
            sample.set_field(result.image_loss[i], 'loss')
            if result.importance is not None:
                sample.set_field(result.importance[i], 'importance')
        return data_samples

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Features of whole images [B, 3, H, W], as the backbone's ``out_type`` asks."""
        return self.backbone(inputs)

    # -- the joint space of image and text

    @property
    def has_joint_space(self) -> bool:
        """Whether texts can be compared with images, see :func:`joins_texts`."""
        return joins_texts(type(self.neck), type(self.head))

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


def joins_texts(decoder: type, target: type) -> bool:
    """Whether tokens are predictions of a CLIP's features without passing the blocks of a decoder, by their classes."""
    return issubclass(target, CLIPTarget) and hasattr(decoder, 'project')
