"""Which patches the encoder gets to see (paper, section 2.4)."""

from __future__ import annotations

import math

import torch
from mmcv.transforms import BaseTransform
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.registry import TRANSFORMS

# Stands for log 0: below the logarithm of every positive float32 plus any noise, and still finite.
LOG_ZERO = -1e3


def draw_mask(weights: Tensor, num_visible: int) -> Tensor:
    """Draw visible patches without replacement, each draw with probability proportional to weight.

    The first ``num_visible`` arrivals of independent exponential clocks with these rates have exactly
    that distribution (Efraimidis and Spirakis, 2006), so one top-k replaces the sequence of draws. A patch
    of weight zero is drawn only after all others.

    Args:
        weights: Non-negative weights [B, N], float.
        num_visible: Number V of patches to draw for each image, 0 <= V <= N.

    Returns:
        Boolean mask [B, N], True = masked; exactly V entries of each row are False.
    """
    weights = weights.float()
    log_rate = torch.where(weights > 0, weights.log(), LOG_ZERO)
    log_clock = torch.empty_like(weights).exponential_().log()
    visible = (log_rate - log_clock).topk(num_visible, dim=1, sorted=False).indices
    return torch.ones_like(weights, dtype=torch.bool).scatter_(1, visible, False)


class Masking(BaseTransform):
    """Base of the two masking strategies.

    Args:
        mask_ratio: Share r of the patches that is masked, 0 <= r < 1.
        rounding: 'floor' keeps ⌊(1-r)N⌋ patches as the published code does, 'ceil' keeps ⌈(1-r)N⌉ as the
            paper writes. They agree at N = 196, r = 0.75.
    """

    def __init__(self, mask_ratio: float = 0.75, rounding: str = 'floor') -> None:
        if not 0 <= mask_ratio < 1:
            raise InputError(f'mask_ratio={mask_ratio} leaves no patch; choose 0 <= mask_ratio < 1.')
        if rounding not in ('floor', 'ceil'):
            raise InputError(f"rounding={rounding!r} is unknown; choose 'floor' or 'ceil'.")
        self.mask_ratio = mask_ratio
        self.rounding = rounding

    def num_visible(self, num_patches: int) -> int:
        """Number V of patches that stay visible out of N."""
        # 12 decimals: 1 - 0.9 must count as 0.1, whose product with 10 is 1 and not 0.99...
        exact = round((1 - self.mask_ratio) * num_patches, 12)
        visible = math.floor(exact) if self.rounding == 'floor' else math.ceil(exact)
        if visible < 1:
            raise InputError(f'mask_ratio={self.mask_ratio} leaves none of {num_patches} patches visible; lower it.')
        return visible

    def draw(self, importance: Tensor) -> Tensor:
        """Mask a batch: importance [B, N] -> boolean mask [B, N], True = masked."""
        raise NotImplementedError

    def transform(self, results: dict) -> dict:
        """As a data-pipeline transform: ``results['importance']`` (N values, any shape) gives
        ``results['mask']``, a boolean array [N], True = masked, which ``PackInputs`` packs."""
        if 'importance' not in results:
            raise InputError(
                f"{type(self).__name__} finds no results['importance'] for "
                f'{results.get("img_path", "the sample")}; add a transform before it that loads the map.'
            )
        importance = torch.as_tensor(results['importance']).flatten()
        results['mask'] = self.draw(importance[None])[0].numpy()
        return results


@TRANSFORMS.register_module()
class SemanticAwareMasking(Masking):
    """Patches are kept with probability proportional to their importance (paper, section 2.4).

    Importance is the attention of CLIP's class token to each patch. The paper has the class token's
    attention to itself in the pool as well; since draws without replacement from the rest of the pool
    do not depend on it, keeping it out, as the published code does, changes nothing for the patches.
    """

    def draw(self, importance: Tensor) -> Tensor:
        return draw_mask(importance, self.num_visible(importance.shape[1]))


@TRANSFORMS.register_module()
class RandomMasking(Masking):
    """Every patch is kept with the same probability (MAE; rows RS of the paper's table 8)."""

    def draw(self, importance: Tensor) -> Tensor:
        return draw_mask(torch.ones_like(importance), self.num_visible(importance.shape[1]))
