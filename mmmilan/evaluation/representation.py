"""How good are features without labels?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmmilan.models.milan import MILAN


def rankme(features: np.ndarray) -> float:
    """RankMe, the effective rank of features (arXiv 2210.02885, equation 1).

    exp of the entropy of the singular values over their sum: 1 if all features are multiples of one, D if all
    directions are used alike. It cannot exceed the number of images, so compare it on the same images only.

    Args:
        features: [M, D], not centred.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


@torch.no_grad()
def cosine_to_teacher(model: MILAN, images: Tensor) -> tuple[float, float] | None:
    """How close the prediction of whole images is to the teacher's features.

    Args:
        model: With a teacher of features as its target.
        images: Normalised images [B, 3, H, W], of which nothing is masked.

    Returns:
        The mean cosine of class tokens and that of patches; None where the model has no joint space.
    """
    if not model.has_joint_space:
        return None
    features, _ = model.head.run_teacher(images)
    predicted = model.embed_joint(images)
    cosine = torch.cosine_similarity(predicted, features.float(), dim=-1).mean(0)
    return float(cosine[0]), float(cosine[1:].mean())
