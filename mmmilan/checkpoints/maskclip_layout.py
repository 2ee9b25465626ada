"""MaskCLIP's weights under the names of open_clip.

open_clip's ViT has no bias in its patch embedding. The bias moves into the positions, to which it is added anyway.
"""

from __future__ import annotations

import re

from torch import Tensor

from mmmilan.errors import InputError

NORM_EPS = 1e-6  # of mmpretrain's ViT; open_clip's own is 1e-5
# The parts of a block of the image tower: MaskCLIP's name and open_clip's.
_BLOCK = {
    'ln1.': 'ln_1.',
    'attn.qkv.': 'attn.in_proj_',
    'attn.proj.': 'attn.out_proj.',
    'ln2.': 'ln_2.',
    'ffn.layers.0.0.': 'mlp.c_fc.',
    'ffn.layers.1.': 'mlp.c_proj.',
}
_BLOCK_KEY = re.compile(rf'backbone\.layers\.(\d+)\.({"|".join(map(re.escape, _BLOCK))})(weight|bias)')


def is_maskclip(weights: dict[str, Tensor]) -> bool:
    """Whether a state dict is that of a :class:`MaskCLIP`."""
    return 'image_projection.weight' in weights and 'backbone.cls_token' in weights


def to_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both towers and the temperature of a MaskCLIP state dict, as open_clip names and shapes them.

    Raises:
        InputError: the encoder has a weight that open_clip's ViT has no place for, such as layer scale.
    """
    positions = weights['backbone.pos_embed'][0].clone()
    positions[1:] += weights['backbone.patch_embed.projection.bias']
    converted = {
        'logit_scale': weights['logit_scale'],
        'visual.class_embedding': weights['backbone.cls_token'][0, 0],
        'visual.positional_embedding': positions,
        'visual.conv1.weight': weights['backbone.patch_embed.projection.weight'],
        'visual.ln_post.weight': weights['backbone.ln1.weight'],
        'visual.ln_post.bias': weights['backbone.ln1.bias'],
        'visual.proj': weights['image_projection.weight'].T,
    }
    for key, value in weights.items():
        if key.startswith('text.'):
            converted[key.removeprefix('text.')] = value
        elif key.startswith('backbone.layers.'):
            converted[_block_key(key)] = value
    return converted


def _block_key(key: str) -> str:
    match = _BLOCK_KEY.fullmatch(key)
    if match is None:
        raise InputError(f"open_clip's ViT has no place for {key!r}; only a plain MILANViT can be exported.")
    layer, part, kind = match.groups()
    return f'visual.transformer.resblocks.{layer}.{_BLOCK[part]}{kind}'
