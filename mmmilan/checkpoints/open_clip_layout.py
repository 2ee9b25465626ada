"""Weights under the names of open_clip, which are OpenAI's: MaskCLIP's towers there, a CLIP's image tower back.

open_clip's ViT has no bias in its patch embedding. MaskCLIP's moves into the positions, to which it is added anyway.
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
_CLIP_PARTS = {clips: ours for ours, clips in _BLOCK.items()}
_CLIP_BLOCK_KEY = re.compile(rf'transformer\.resblocks\.(\d+)\.({"|".join(map(re.escape, _CLIP_PARTS))})(weight|bias)')
# The rest of a CLIP's image tower: its name, and that in mmpretrain's ViT with ``pre_norm=True``.
_CLIP_STEM = {
    'conv1.weight': 'patch_embed.projection.weight',
    'class_embedding': 'cls_token',
    'positional_embedding': 'pos_embed',
    'ln_pre.weight': 'pre_norm.weight',
    'ln_pre.bias': 'pre_norm.bias',
    'ln_post.weight': 'ln1.weight',
    'ln_post.bias': 'ln1.bias',
}


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


def is_clip_tower(weights: dict[str, Tensor]) -> bool:
    """Whether a state dict holds a CLIP's ViT, of OpenAI's or open_clip's names, with its norm before the blocks."""
    return 'visual.ln_pre.weight' in weights or 'ln_pre.weight' in weights


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's image tower as the encoder of this project: mmpretrain's ``VisionTransformer(pre_norm=True)``.

    Everything else, such as the text tower and the projections, keeps its name.

    Raises:
        InputError: the tower has a weight that this ViT has no place for.
    """
    prefix = 'visual.' if 'visual.ln_pre.weight' in weights else ''
    converted = {}
    for key, value in weights.items():
        name = key.removeprefix(prefix)
        match = _CLIP_BLOCK_KEY.fullmatch(name) if key.startswith(prefix) else None
        if not key.startswith(prefix) or name == 'proj':
            converted[key] = value
        elif match:
            converted[f'backbone.layers.{match[1]}.{_CLIP_PARTS[match[2]]}{match[3]}'] = value
        elif name in _CLIP_STEM:
            if name.endswith('_embedding'):  # [D] and [1 + N, D] there, both with a batch of one here
                value = value.reshape(1, -1, value.shape[-1])
            converted[f'backbone.{_CLIP_STEM[name]}'] = value
        elif prefix:
            raise InputError(f"mmpretrain's ViT has no place for {key!r}; give a plain CLIP ViT.")
        else:  # of the rest of a file without prefixes
            converted[key] = value
    return converted
