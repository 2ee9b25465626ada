"""CLIP: contrastive training of an image and a text encoder on captioned images (arXiv 2103.00020)."""

from __future__ import annotations

import math

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.model import BaseModel
from mmpretrain.structures import DataSample
from torch import Tensor

from mmmilan.registry import MODELS

MAX_LOGIT_SCALE = math.log(100)


@MODELS.register_module()
class CLIP(BaseModel):
    """open_clip's CLIP in MMEngine's runner. Its checkpoint is a teacher: ``OpenCLIPTeacher(pretrained=FILE)``.

    Args:
        embed_dim: Width of the joint space.
        vision_cfg: open_clip's settings of a ViT tower; heads must be 64 wide, as in OpenAI's models.
        text_cfg: open_clip's settings of the text tower.
        data_preprocessor: Config of the normalisation of images.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict,
        text_cfg: dict,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        import open_clip

        super().__init__(data_preprocessor, init_cfg)
        self.clip = open_clip.CLIP(embed_dim, dict(vision_cfg), dict(text_cfg), quick_gelu=True)
        self.contrast = open_clip.ClipLoss(
            local_loss=True, gather_with_grad=True, rank=get_rank(), world_size=get_world_size()
        )

    def forward(
        self, inputs: Tensor, data_samples: list[DataSample] | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | Tensor:
        """MMEngine's entry: 'loss' trains, 'tensor' gives normalised image embeddings [B, embed_dim]."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return self.clip.encode_image(inputs, normalize=True)

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Symmetric InfoNCE over the global batch: images [B, 3, H, W], ``data_sample.text`` token ids."""
        self.clip.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        text = torch.stack([sample.text for sample in data_samples])
        image_features = self.clip.encode_image(inputs, normalize=True)
        text_features = self.clip.encode_text(text, normalize=True)
        return dict(loss=self.contrast(image_features, text_features, self.clip.logit_scale.exp()))
