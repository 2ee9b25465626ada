"""MILAN: masked image pretraining on language assisted representation (paper, figure 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mmengine.model import BaseModel
from mmpretrain.structures import DataSample
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.masking import SemanticAwareMasking
from mmmilan.models.compilation import compile_forward
from mmmilan.models.tokens import gather_tokens
from mmmilan.registry import MODELS, TRANSFORMS


@dataclass
class Reconstruction:
    """One masked forward pass.

    Attributes:
        order: Patch indices [B, N]: the visible ones, then the masked ones, each in image order.
        num_visible: Number V of visible patches.
        token_loss: Loss [B, T] of the predicted tokens in the order [class token, ``order``].
        loss: The training loss, a scalar.
        importance: Attention of the teacher's class token to each patch [B, N]; None without a teacher.
    """

    order: Tensor
    num_visible: int
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
        compile: Compile encoder, decoder and teacher before the first training step; a dict gives options of
            ``torch.compile``. Without a compiler the model runs as it is, with a warning.
    """

    def __init__(
        self,
        backbone: dict,
        masking: dict,
        neck: dict,
        head: dict,
        data_preprocessor: dict | None = None,
        compile: bool | dict = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.compile_options = {} if compile is True else compile or None  # None: not to be compiled, or done
        self.backbone = MODELS.build(backbone)
        self.masking = TRANSFORMS.build(masking)
        self.neck = MODELS.build(neck)
        self.head = MODELS.build(head)
        self._check_widths()

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
        if self.compile_options is not None:
            parts = [self.head.teacher, self.backbone, self.neck]
            compile_forward([part for part in parts if part is not None], inputs.device, **self.compile_options)
            self.compile_options = None
        return dict(loss=self.reconstruct(inputs, data_samples).loss)

    def reconstruct(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> Reconstruction:
        """The algorithm: target, mask, encoder, decoder, loss."""
        target, importance = self.head.target(inputs)
        order, num_visible = self.draw_order(target, importance, data_samples)
        visible, masked = order[:, :num_visible], order[:, num_visible:]

        latent = self.backbone(inputs, visible)
        pred = self.neck(latent, visible, masked)

        num_predicted = pred.shape[1] - 1  # without a decoder, the visible patches only
        target_patches = gather_tokens(target[:, 1:], order[:, :num_predicted])
        token_loss = self.head.token_loss(pred, torch.cat([target[:, :1], target_patches], dim=1))
        loss = token_loss[:, self.head.counted(num_visible)].mean()
        return Reconstruction(order, num_visible, token_loss, loss, importance)

    def draw_order(
        self, target: Tensor, importance: Tensor | None, data_samples: list[DataSample] | None
    ) -> tuple[Tensor, int]:
        """Order [B, N] of the patches, visible ones first, and the number V of visible ones."""
        num_patches = target.shape[1] - 1
        if num_patches != self.backbone.num_patches:
            raise InputError(
                f'The target has {num_patches} patches and the encoder {self.backbone.num_patches}; set '
                "the teacher's input_size so that its grid is the encoder's."
            )
        if any('mask' in sample for sample in data_samples or []):
            mask, num_visible = self._supplied_mask(data_samples, num_patches)
        else:
            if importance is None:  # only RandomMasking gets here, see __init__
                importance = target.new_ones(len(target), num_patches)
            mask, num_visible = self.masking.draw(importance), self.masking.num_visible(num_patches)
        return mask.byte().argsort(dim=1, stable=True), num_visible

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> list[DataSample]:
        """What a figure needs, set on each data sample: ``mask`` [N] (True = masked), ``patch_loss`` [N] (NaN
        where nothing is predicted), ``importance`` [N] (with a teacher) and the image's ``loss``."""
        result = self.reconstruct(inputs, data_samples)
        order, token_loss = result.order, result.token_loss
        mask = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, : result.num_visible], False)
        patch_loss = token_loss.new_full(order.shape, torch.nan)
        patch_loss.scatter_(1, order[:, : token_loss.shape[1] - 1], token_loss[:, 1:])
        data_samples = data_samples or [DataSample() for _ in inputs]
        for i, sample in enumerate(data_samples):
            sample.set_mask(mask[i])
            sample.set_field(patch_loss[i], 'patch_loss')
            sample.set_field(token_loss[i, self.head.counted(result.num_visible)].mean(), 'loss')
            if result.importance is not None:
                sample.set_field(result.importance[i], 'importance')
        return data_samples

    def _supplied_mask(self, data_samples: list[DataSample], num_patches: int) -> tuple[Tensor, int]:
        """Masks of the data pipeline as one tensor, with their common number of visible patches."""
        num_missing = sum('mask' not in sample for sample in data_samples)
        if num_missing:
            raise InputError(
                f'{num_missing} of the {len(data_samples)} images of a batch have no data_sample.mask; '
                'give every image a mask, or none.'
            )
        mask = torch.stack([sample.mask.flatten().bool() for sample in data_samples])
        num_visible = (~mask).sum(1).tolist()
        if mask.shape[1] != num_patches:
            raise InputError(f'data_sample.mask has {mask.shape[1]} entries for {num_patches} patches.')
        if len(set(num_visible)) > 1:
            raise InputError(
                f'The masks of one batch leave {sorted(set(num_visible))} patches visible; every mask '
                'must leave the same number.'
            )
        return mask, num_visible[0]

    def _check_widths(self) -> None:
        """Every part must fit the next one; better said here than at the first iteration."""
        if self.neck.embed_dim != self.backbone.embed_dims:
            raise InputError(
                f'neck.embed_dim={self.neck.embed_dim} but the encoder gives {self.backbone.embed_dims} '
                'dimensions; make them equal.'
            )
        if getattr(self.neck, 'num_patches', self.backbone.num_patches) != self.backbone.num_patches:
            raise InputError(
                f'neck.num_patches={self.neck.num_patches} but the encoder has {self.backbone.num_patches} '
                'patches; make them equal.'
            )
        if self.neck.predict_feature_dim != self.head.feature_dim:
            raise InputError(
                f'neck.predict_feature_dim={self.neck.predict_feature_dim} but the target has '
                f'{self.head.feature_dim} dimensions; make them equal.'
            )
        teacher = self.head.teacher
        if teacher is not None and teacher.num_patches != self.backbone.num_patches:
            raise InputError(
                f"The teacher's grid has {teacher.num_patches} patches and the encoder's "
                f'{self.backbone.num_patches}; set input_size of the teacher to '
                f'{int(self.backbone.num_patches**0.5) * teacher.patch_size}.'
            )
        if teacher is None and isinstance(self.masking, SemanticAwareMasking):
            raise InputError('SemanticAwareMasking needs a teacher; give the head one, or use RandomMasking.')
