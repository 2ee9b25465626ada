"""MaskCLIP's weights as an open_clip model.

open_clip's ViT has no bias in its patch embedding: ours goes into the positions, to which it is added anyway.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmmilan.checkpoints.io import save_checkpoint_file, write_text
from mmmilan.errors import InputError

if TYPE_CHECKING:
    from mmmilan.models.maskclip import MaskCLIP

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


def write_open_clip(model: MaskCLIP, folder: str | Path) -> None:
    """Write a model so that ``open_clip.create_model_and_transforms('local-dir:FOLDER')`` loads it.

    Args:
        model: The model; ``open_clip`` then gives the same embeddings.
        folder: Where ``open_clip_config.json`` and ``open_clip_model.safetensors`` are written.
    """
    config = dict(model_cfg=open_clip_config(model), preprocess_cfg=_preprocessing(model))
    save_checkpoint_file(to_open_clip(model.state_dict()), Path(folder, 'open_clip_model.safetensors'))
    write_text(Path(folder, 'open_clip_config.json'), json.dumps(config, indent=2))


def open_clip_config(model: MaskCLIP) -> dict[str, Any]:
    """open_clip's config of the architecture of a model."""
    arch = model.backbone.arch_settings
    vision = dict(
        image_size=model.backbone.img_size[0],
        patch_size=model.backbone.patch_embed.projection.kernel_size[0],
        width=arch['embed_dims'],
        layers=arch['num_layers'],
        head_width=arch['embed_dims'] // arch['num_heads'],
        mlp_ratio=arch['feedforward_channels'] / arch['embed_dims'],
        no_ln_pre=True,
        norm_kwargs=dict(eps=NORM_EPS),
    )
    return dict(embed_dim=model.image_projection.out_features, vision_cfg=vision, text_cfg=dict(model.text_cfg))


def _preprocessing(model: MaskCLIP) -> dict[str, Any]:
    """open_clip's config of the normalisation, which it applies to RGB in [0, 1]."""
    normalisation = model.data_preprocessor
    mean, std = ((value.flatten() / 255).tolist() for value in (normalisation.mean, normalisation.std))
    return dict(mean=mean, std=std, interpolation='bicubic')
