"""Semantic-aware probing: a classifier of the patches to which a teacher attends most."""

from __future__ import annotations

import torch
from mmpretrain.models import ImageClassifier
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.models.fitting import check_grid
from mmmilan.models.vit import MILANViT
from mmmilan.models.wrapping import Frozen
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher, build_teacher
from mmmilan.teachers.base import statistics_of


@MODELS.register_module()
class SemanticAwareClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` that tells the teacher of a :class:`SemanticAwareViT` its images' statistics.

    With mmpretrain's own, the teacher takes them to be those of ImageNet. Same arguments.
    """

    def __init__(self, backbone: dict, *args, data_preprocessor: dict | None = None, **kwargs) -> None:
        super().__init__(backbone, *args, data_preprocessor=data_preprocessor, **kwargs)
        self.backbone.teacher.module.take_images(*statistics_of(data_preprocessor))


@MODELS.register_module()
class SemanticAwareViT(MILANViT):
    """Semantic-aware probing (paper, table 7, row 6): an encoder sees the patches to which a teacher attends most.

    As the backbone of a :class:`SemanticAwareClassifier` it gives the class token. No random draw is made: the same
    image shows the same patches in training and in validation. The teacher is frozen and not in the state dict.

    Args:
        teacher: Config or name of the teacher.
        keep_ratio: Share of the patches that the encoder sees, 0 < keep_ratio <= 1; rounded down to whole patches. The
            published code has 0.7, which are 137 of 196 patches; the paper says 0.5.
        kwargs: Arguments of :class:`MILANViT`.

    Raises:
        InputError: if the teacher's grid is not the encoder's, or no patch would be left.
    """

    def __init__(self, teacher: dict | str | Teacher, keep_ratio: float = 0.7, **kwargs) -> None:
        super().__init__(**kwargs)
        self.teacher = Frozen(build_teacher(teacher))
        self.num_visible = int(round(keep_ratio * self.num_patches, 6))
        if not 1 <= self.num_visible <= self.num_patches:
            raise InputError(
                f'keep_ratio={keep_ratio} shows {self.num_visible} of {self.num_patches} patches; '
                'choose 0 < keep_ratio <= 1 so that at least one is seen.'
            )
        check_grid(self.teacher.module, self, 'teacher')

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Class token [B, D] of normalised images [B, 3, H, W], after the final norm."""
        return (super().forward(images, self.important_patches(images))[:, 0],)

    @torch.no_grad()
    def important_patches(self, images: Tensor) -> Tensor:
        """Indices [B, V] of the V most important patches of each image, int64."""
        _, importance = self.teacher(images)
        return importance.topk(self.num_visible, dim=1).indices
