"""The options that reduce the cost of a step: another decoder and target, or a teacher whose output is known."""

from __future__ import annotations

import numpy as np
import torch
from mmengine.config import ConfigDict
from torch import Tensor

from mmmilan.models import MILAN
from mmmilan.teachers.cache import encode

OPTIONS = ('alignment', 'cached')


def align(model: ConfigDict) -> None:
    """Replace decoder and target by a ``LayerMixture`` and a ``LayerAlignment``."""
    width, layers = model.backbone.arch['embed_dims'], model.backbone.arch['num_layers']
    model.backbone.out_indices = list(range(layers))
    model.head.type = 'mmmilan.LayerAlignment'
    teacher_width = torch.load(model.head.teacher.pretrained)['visual.conv1.weight'].shape[0]
    model.neck = dict(
        type='mmmilan.LayerMixture', embed_dim=width, num_layers=layers, predict_feature_dim=2 * teacher_width
    )


def random_records(model: MILAN, images: Tensor) -> np.ndarray:
    """Records [B] of a cache, of random features and importance, for images [B, 3, H, W], uint8."""
    patches = model.backbone.num_patches
    features = torch.randn(len(images), 1 + patches, model.head.feature_dim)
    return encode(images.cpu(), features, torch.rand(len(images), patches))
