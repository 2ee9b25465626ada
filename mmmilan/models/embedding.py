"""The features of an image for other programs: class token, mean token, patch tokens, and the joint embedding."""

from __future__ import annotations

import hashlib

import torch.nn.functional as F
from torch import Tensor, nn

from mmmilan.errors import InputError


class Embedder(nn.Module):
    """Features of whole images, by name: for export to ONNX and for files of features.

    Args:
        backbone: A ViT of mmpretrain's kind with a class token, such as :class:`MILANViT`.
        neck: The decoder that it was pretrained with, if it projects tokens to a CLIP's features; else None.

    Raises:
        InputError: the backbone gives feature maps and no tokens, as those of detectors and segmentors.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None) -> None:
        super().__init__()
        check_tokens(backbone)
        self.backbone = backbone
        self.backbone.out_type = 'raw'
        self.neck = neck

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [B, 3, H, W] -> features by name.

        Returns:
            ``class_token`` and ``mean_token`` [B, D], ``patch_tokens`` [B, N, D], and with a decoder ``embedding``
            [B, C]: its prediction of the teacher's class token, which is of length 1 in the joint space of image and
            text.
        """
        tokens = self.backbone(images)[-1]
        features = split_tokens(self.backbone, tokens)
        if self.neck is not None:
            features['embedding'] = F.normalize(self.neck.project(tokens[:, :1])[:, 0].float(), dim=-1)
        return features


def check_tokens(backbone: nn.Module) -> None:
    """Raise an :class:`InputError` if a backbone gives no tokens."""
    if 'raw' not in getattr(backbone, 'OUT_TYPES', ()) or not hasattr(backbone, 'out_type'):
        raise InputError(
            f'The encoder of this model, a {type(backbone).__name__}, gives feature maps and no tokens of an image; '
            'give the checkpoint that the detector or segmentor started from.'
        )


def fingerprint(encoder: nn.Module) -> str:
    """16 hexadecimal digits that tell the weights of an encoder from others, on any device."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def split_tokens(backbone: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """All tokens of a ViT [B, 1 + N, D] -> ``class_token`` and ``mean_token`` [B, D], ``patch_tokens`` [B, N, D]."""
    patches = tokens[:, 1:]
    mean = patches.mean(1)
    if hasattr(backbone, 'ln2'):  # of a classifier on the mean token
        mean = backbone.ln2(mean)
    return dict(class_token=tokens[:, 0], mean_token=mean, patch_tokens=patches)


def class_and_mean(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """``class_token`` and ``mean_token`` [B, D] of normalised images, whatever ``out_type`` the encoder has."""
    out_type, backbone.out_type = backbone.out_type, 'raw'
    try:
        features = split_tokens(backbone, backbone(images)[-1])
    finally:
        backbone.out_type = out_type
    return {name: features[name] for name in ('class_token', 'mean_token')}
