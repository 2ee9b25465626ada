"""Which patches the encoder sees (paper, section 2.4)."""

from __future__ import annotations

import math

import torch
from mmcv.transforms import BaseTransform
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.registry import TRANSFORMS

# In place of log 0: finite, but lower than the logarithm of any positive float32 plus noise.
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


def split_patches(mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Indices of the visible and of the masked patches, each in image order.

    Args:
        mask: Boolean mask [B, N], True = masked, with ``num_visible`` False entries in each row.
        num_visible: Number V of visible patches.

    Returns:
        Visible [B, V] and masked [B, N - V], int64.
    """
    return mask.byte().argsort(dim=1, stable=True).split([num_visible, mask.shape[1] - num_visible], dim=1)


def supplied_masks(data_samples: list[BaseDataElement] | None, num_patches: int) -> Tensor | None:
    """Masks [B, N] that the data pipeline set as ``data_sample.mask``; None if it set none.

    Raises:
        InputError: only some images have a mask, or the masks differ in size or in their number of visible patches.
    """
    masks = [sample.mask.flatten().bool() for sample in data_samples or [] if 'mask' in sample]
    if not masks:
        return None
    if len(masks) < len(data_samples):
        raise InputError(
            f'{len(data_samples) - len(masks)} of the {len(data_samples)} images of a batch have no data_sample.mask; '
            'give every image a mask, or none.'
        )
    sizes = sorted({len(mask) for mask in masks})
    if sizes != [num_patches]:
        raise InputError(
            f'data_sample.mask has {sizes[0]} entries for {num_patches} patches; give one entry per patch.'
        )
    visible = sorted({int((~mask).sum()) for mask in masks})
    if len(visible) > 1:
        raise InputError(
            f'The masks of one batch leave {visible} patches visible; every mask must leave the same number.'
        )
    return torch.stack(masks)


class Masking(BaseTransform):
    """Base of the masking strategies.

    Args:
        mask_ratio: Share r of the patches that is masked, 0 <= r < 1.
        rounding: 'floor' keeps ⌊(1-r)N⌋ patches as the published code does, 'ceil' keeps ⌈(1-r)N⌉ as the
            paper writes. They agree at N = 196, r = 0.75.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(self, mask_ratio: float = 0.75, rounding: str = 'floor') -> None:
        if not 0 <= mask_ratio < 1:
            raise InputError(f'mask_ratio={mask_ratio} leaves no patch; choose 0 <= mask_ratio < 1.')
        if rounding not in ('floor', 'ceil'):
            raise InputError(f"rounding={rounding!r} is unknown; choose 'floor' or 'ceil'.")
        self.mask_ratio = mask_ratio
        self.rounding = rounding

    def num_visible(self, num_patches: int) -> int:
        """Number V of patches that stay visible out of N.

        Raises:
            InputError: no patch stays visible.
        """
        # 12 decimals: 1 - 0.9 must count as 0.1, whose product with 10 is 1 and not 0.99...
        exact = round((1 - self.mask_ratio) * num_patches, 12)
        visible = math.floor(exact) if self.rounding == 'floor' else math.ceil(exact)
        if visible < 1:
            raise InputError(f'mask_ratio={self.mask_ratio} leaves none of {num_patches} patches visible; lower it.')
        return visible

    def draw(self, importance: Tensor | None, shape: tuple[int, int], device: torch.device | str = 'cpu') -> Tensor:
        """Mask a batch.

        Args:
            importance: Importance [B, N] of the patches, or None where there is no teacher.
            shape: (B, N).
            device: Where to draw if there is no importance.

        Returns:
            Boolean mask [B, N], True = masked.
        """
        raise NotImplementedError

    def transform(self, results: dict) -> dict:
        """Draw a mask in a data pipeline.

        ``results['importance']`` (N values, any shape) gives ``results['mask']``, bool [N], True = masked, which
        ``PackInputs`` packs.

        Raises:
            InputError: the sample has no importance map.
        """
        if 'importance' not in results:
            raise InputError(
                f"{type(self).__name__} finds no results['importance'] for "
                f'{results.get("img_path", "the sample")}; add a transform before it that loads the map.'
            )
        importance = torch.as_tensor(results['importance']).flatten()[None]
        results['mask'] = self.draw(importance, importance.shape)[0].numpy()
        return results


@TRANSFORMS.register_module()
class SemanticAwareMasking(Masking):
    """Keep patches with probability proportional to their importance (paper, section 2.4).

    Importance is the attention of CLIP's class token to each patch. In the paper the class token itself can be
    drawn too. In draws without replacement this does not affect the order in which patches are drawn, so leaving it
    out, as the published code does, keeps the distribution of the mask.
    """

    def draw(self, importance: Tensor, shape: tuple[int, int], device: torch.device | str = 'cpu') -> Tensor:
        return draw_mask(importance, self.num_visible(shape[1]))


@TRANSFORMS.register_module()
class RandomMasking(Masking):
    """Keep every patch with the same probability (MAE; rows RS of the paper's table 8)."""

    def draw(self, importance: Tensor | None, shape: tuple[int, int], device: torch.device | str = 'cpu') -> Tensor:
        device = device if importance is None else importance.device
        return draw_mask(torch.ones(shape, device=device), self.num_visible(shape[1]))
