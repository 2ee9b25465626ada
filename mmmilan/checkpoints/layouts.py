"""The key layouts in which ViT and MILAN weights are published, and the way from one to another.

``TABLE`` says everything: one row a parameter, one column a layout. Converting is reading a row in one column
and writing it in another, so both directions come from the same text and no weight is ever changed. Only
Hugging Face's separate query, key and value are joined into ``qkv`` and split again.

The names of open_clip are no column, as its CLIP is another model than a ViT: they are at the end of this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmmilan.errors import InputError

# In a name, # is a layer's number and * the parameter's own name (weight, bias, running_mean, ...). None: the layout
# has no place for it. Hugging Face's ``qkv`` is in fact query, key and value: see ``_join_qkv`` and ``_split_qkv``.
TABLE = [
    # mmmilan, OpenMMLab; the published repository, MAE, timm; Hugging Face
    ('backbone.cls_token', 'cls_token', 'embeddings.cls_token'),
    ('backbone.pos_embed', 'pos_embed', 'embeddings.position_embeddings'),
    ('backbone.patch_embed.projection.*', 'patch_embed.proj.*', 'embeddings.patch_embeddings.projection.*'),
    ('backbone.layers.#.ln1.*', 'blocks.#.norm1.*', 'encoder.layer.#.layernorm_before.*'),
    ('backbone.layers.#.attn.qkv.*', 'blocks.#.attn.qkv.*', 'encoder.layer.#.attention.attention.qkv.*'),
    ('backbone.layers.#.attn.proj.*', 'blocks.#.attn.proj.*', 'encoder.layer.#.attention.output.dense.*'),
    ('backbone.layers.#.ln2.*', 'blocks.#.norm2.*', 'encoder.layer.#.layernorm_after.*'),
    ('backbone.layers.#.ffn.layers.0.0.*', 'blocks.#.mlp.fc1.*', 'encoder.layer.#.intermediate.dense.*'),
    ('backbone.layers.#.ffn.layers.1.*', 'blocks.#.mlp.fc2.*', 'encoder.layer.#.output.dense.*'),
    ('backbone.ln1.*', 'norm.*', 'layernorm.*'),  # of every token
    # pretraining: the prompting decoder (q and kv), or MAE's (qkv; Hugging Face's ViTMAEForPreTraining)
    ('neck.decoder_embed.*', 'decoder_embed.*', 'decoder.decoder_embed.*'),
    ('neck.mask_token', 'mask_token', 'decoder.mask_token'),
    ('neck.decoder_pos_embed', 'decoder_pos_embed', 'decoder.decoder_pos_embed'),
    ('neck.decoder_blocks.#.ln1.*', 'decoder_blocks.#.norm1.*', 'decoder.decoder_layers.#.layernorm_before.*'),
    ('neck.decoder_blocks.#.attn.q.*', 'decoder_blocks.#.attn.q.*', None),
    ('neck.decoder_blocks.#.attn.kv.*', 'decoder_blocks.#.attn.kv.*', None),
    (
        'neck.decoder_blocks.#.attn.qkv.*',
        'decoder_blocks.#.attn.qkv.*',
        'decoder.decoder_layers.#.attention.attention.qkv.*',
    ),
    (
        'neck.decoder_blocks.#.attn.proj.*',
        'decoder_blocks.#.attn.proj.*',
        'decoder.decoder_layers.#.attention.output.dense.*',
    ),
    ('neck.decoder_blocks.#.ln2.*', 'decoder_blocks.#.norm2.*', 'decoder.decoder_layers.#.layernorm_after.*'),
    (
        'neck.decoder_blocks.#.ffn.layers.0.0.*',
        'decoder_blocks.#.mlp.fc1.*',
        'decoder.decoder_layers.#.intermediate.dense.*',
    ),
    ('neck.decoder_blocks.#.ffn.layers.1.*', 'decoder_blocks.#.mlp.fc2.*', 'decoder.decoder_layers.#.output.dense.*'),
    ('neck.ln1.*', 'decoder_norm.*', 'decoder.decoder_norm.*'),
    ('neck.decoder_pred.*', 'decoder_pred.*', 'decoder.decoder_pred.*'),
]
# What classifies, by what it looks at. A head's own name follows from that (mmpretrain's LinearClsHead after the mean
# of the patch tokens, VisionTransformerClsHead after the class token), where two rows share a name the first is meant.
CLASSIFIERS = {
    'linear probe': [('neck.bn.*', 'head.0.*', None), ('head.layers.head.*', 'head.1.*', None)],
    'classifier on the mean token': [
        ('backbone.ln2.*', 'fc_norm.*', None),
        ('head.fc.*', 'head.*', None),
        ('head.layers.head.*', 'head.*', None),
    ],
    'classifier on the class token': [
        ('head.layers.head.*', 'head.*', 'classifier.*'),
        ('head.fc.*', 'head.*', 'classifier.*'),
    ],
}
# Parts of other ViTs, mostly of timm, by their keys.
OTHER_VITS = {
    r'blocks\.\d+\.ls[12]\.gamma|blocks\.\d+\.gamma_[12]': 'LayerScale (DeiT III, BEiT, DINOv2)',
    r'reg_token|register_tokens': 'register tokens (DINOv2, DINOv3)',
    r'dist_token|head_dist\..+|embeddings\.distillation_token': 'a distillation token (DeiT)',
    r'norm_pre\..+': "a norm before the first block (CLIP's ViT)",
    r'blocks\.\d+\.attn\.[qk]_norm\..+': 'norms of queries and keys (ViT-22B)',
    r'blocks\.\d+\.mlp\.(fc1_[gx]|w12|w3|norm)\..+': 'a gated MLP (SwiGLU)',
    r'(blocks\.\d+\.attn\.)?(relative_position_bias_table|rel_pos\..+)': 'relative positions (BEiT)',
    r'attn_pool\..+': 'attention pooling (SigLIP)',
    r'patch_embed\.backbone\..+': 'a convolutional stem (hybrid ViT)',
}
# Models of which only the encoder has a place in other layouts.
WITHOUT_ROWS = ('detector or segmentor', 'MaskCLIP')
COLUMN = {'mmmilan': 0, 'openmmlab': 0, 'official': 1, 'timm': 1, 'huggingface': 2}
TITLE = {
    'mmmilan': 'mmmilan',
    'openmmlab': 'OpenMMLab',
    'official': 'the published MILAN or MAE repository',
    'timm': 'timm',
    'huggingface': 'Hugging Face ViT',
}
# Parts that belong to no student: the frozen CLIP that mmpretrain saves with MILAN, and the tanh layer that
# Hugging Face's ViTModel puts on the class token and that no image model here uses.
DROPPED = ('target_generator.', 'pooler.', 'data_preprocessor.')

_PATCH_WEIGHT = [name.replace('*', 'weight') for name in TABLE[2]]
# The same with the part of its own that a whole model puts before its encoder; the longer names first.
_PATCH_ENDINGS = (_PATCH_WEIGHT[0], f'vit.{_PATCH_WEIGHT[2]}', 'patch_embed.projection.weight', *_PATCH_WEIGHT[1:])
# What PyTorch puts into names, at any place, when it compiles, shards or checkpoints a module.
_WRAPPERS = re.compile(r'\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
_QUERY_KEY_VALUE = re.compile(
    r'((?:encoder\.layer|decoder\.decoder_layers)\.\d+\.attention\.attention)\.(query|key|value)\.(weight|bias)'
)
_LAYER_NUMBER = re.compile(r'(?:backbone\.layers|blocks|encoder\.layer)\.(\d+)\.')


@dataclass(frozen=True)
class Layout:
    """What a state dict holds.

    Attributes:
        name: a key of ``COLUMN``.
        content: ``'pretraining'``, ``'encoder'``, one of ``WITHOUT_ROWS`` or a key of ``CLASSIFIERS``.
        depth: number of encoder layers.
        embed_dims: width of the encoder.
        decoder: ``'prompting'``, ``'vanilla'`` (MAE's) or None.
        dropped: prefixes of weights that are left out: those of ``DROPPED``, and what stands beside the ViT.
    """

    name: str
    content: str
    depth: int
    embed_dims: int
    decoder: str | None
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        decoder = f', {self.decoder} decoder' if self.decoder else ''
        vit = f'ViT of {self.depth} layers, {self.embed_dims} wide{decoder}'
        dropped = f'; to be left out: {", ".join(f"{prefix}*" for prefix in self.dropped)}' if self.dropped else ''
        return f'{self.content} in the layout of {TITLE[self.name]} ({vit}){dropped}'


def find_models(names: Iterable[str]) -> list[str]:
    """What stands before the names of each ViT: '' or a prefix with its dot.

    It is what remains of the patch embedding's name. SLIP's image tower, under ``visual.``, is one of these ViTs.
    """
    found = {}
    for name in names:
        ending = next((ending for ending in _PATCH_ENDINGS if f'.{name}'.endswith(f'.{ending}')), None)
        if ending:
            found[name.removesuffix(ending)] = True
    return list(found)


def outermost(prefixes: list[str]) -> list[str]:
    """The prefixes that begin with no other one: a model that is part of another is not asked for."""
    return [each for each in prefixes if not any(each != other and each.startswith(other) for other in prefixes)]


def several_models(prefixes: Iterable[str], source: str = '') -> InputError:
    """The error that tells how to choose one of several models by name."""
    names = sorted(prefix.rstrip('.') for prefix in prefixes)
    holds = f'{source} holds several models' if source else 'Several models are in it'
    return InputError(f'{holds} ({", ".join(names)}); write which after the file, as in FILE#{names[0]}.')


def without_prefix(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the only model with a ViT, under its own names; all weights if there is no such model.

    Raises:
        InputError: there are several.
    """
    prefix, weights = _prefix_of(state_dict)
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _prefix_of(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    weights = {_WRAPPERS.sub('', key): value for key, value in state_dict.items()}
    prefixes = outermost(find_models(weights))
    if len(prefixes) > 1:
        raise several_models(prefixes)
    return (prefixes[0] if prefixes else ''), weights


def detect_layout(state_dict: dict[str, Tensor]) -> Layout:
    """Recognise the layout of a state dict by its keys.

    Raises:
        InputError: no ViT in a known layout is in it, or several are, or a value is not a tensor.
    """
    layout = _detect(_uniform_keys(state_dict))
    prefix, weights = _prefix_of(state_dict)
    depth = prefix.count('.')
    outside = {'.'.join(key.split('.')[:depth]) + '.' for key in weights if not key.startswith(prefix)}
    return replace(layout, dropped=layout.dropped + tuple(sorted(outside)))


def convert(state_dict: dict[str, Tensor], to: str = 'mmmilan', encoder_only: bool = False) -> dict[str, Tensor]:
    """Rename the weights of any known layout to another.

    Args:
        state_dict: the weights, of any size of ViT, under any prefix; those beside the ViT's prefix are left out.
        to: a key of ``COLUMN``.
        encoder_only: keep the encoder and leave decoder, heads and detector parts.

    Returns:
        The same tensors under new keys, less what ``DROPPED`` names.

    Raises:
        InputError: a key is unknown, or the layout asked for has no place for it.
    """
    if to not in COLUMN:
        raise InputError(f'The layout {to!r} is unknown; choose one of {", ".join(COLUMN)}.')
    weights = _uniform_keys(state_dict)
    layout = _detect(weights)
    weights = {key: value for key, value in weights.items() if not key.startswith(DROPPED)}
    if layout.content in WITHOUT_ROWS and not encoder_only:
        if COLUMN[to] == COLUMN['mmmilan']:
            return weights
        raise InputError(f'{TITLE[to]} has no place for a {layout.content}; convert its encoder (--encoder-only).')
    if layout.content in WITHOUT_ROWS:
        weights = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    rows = TABLE + CLASSIFIERS.get(layout.content, [])
    if layout.name == 'huggingface':
        weights = _join_qkv(weights)
    converted = _rename(weights, rows, layout.name, to, encoder_only)
    if to == 'huggingface':
        converted = _split_qkv(converted)
        own = ('classifier.', 'decoder.')  # ViTForImageClassification and ViTMAEForPreTraining hold a ViTModel
        if any(key.startswith(own) for key in converted):
            converted = {key if key.startswith(own) else f'vit.{key}': converted[key] for key in converted}
    return converted


def _uniform_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo the prefixes that differ between files of one layout."""
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise InputError(f'{key!r} is a {type(value).__name__}, not a tensor; give the state dict itself.')
    state_dict = without_prefix(state_dict)
    keys = list(state_dict)
    if 'patch_embed.projection.weight' in keys:  # an OpenMMLab backbone on its own
        keys = [f'backbone.{key}' for key in keys]
    keys = [key.removeprefix('vit.') for key in keys]  # ViTForImageClassification, ViTMAEForPreTraining
    return dict(zip(keys, state_dict.values(), strict=True))


def _detect(weights: dict[str, Tensor]) -> Layout:
    found = [column for column, key in enumerate(_PATCH_WEIGHT) if key in weights]
    if not found:
        if any('visual.' in key or 'class_embedding' in key for key in weights):
            raise InputError('This is a CLIP, not a ViT to convert; give the file to the teacher as `pretrained`.')
        some = ', '.join(list(weights)[:3]) or 'none'
        raise InputError(
            f'No ViT in a known layout: none of {", ".join(_PATCH_WEIGHT)} is among the keys ({some}, ...); give a ViT.'
        )
    dropped = tuple(prefix for prefix in DROPPED if any(key.startswith(prefix) for key in weights))
    decoder = None
    if any('decoder_blocks.0.attn.' in key or key.startswith('decoder.decoder_layers.0.') for key in weights):
        decoder = 'prompting' if any('decoder_blocks.0.attn.q.' in key for key in weights) else 'vanilla'
    content = _content(weights, decoder)
    name = ('mmmilan', 'timm', 'huggingface')[found[0]]
    if name == 'mmmilan' and 'target_generator.' in dropped:
        name = 'openmmlab'
    if name == 'timm' and content in ('pretraining', 'linear probe'):
        name = 'official'
    layers = {match[1] for key in weights if (match := _LAYER_NUMBER.match(key))}
    return Layout(name, content, len(layers), len(weights[_PATCH_WEIGHT[found[0]]]), decoder, dropped)


def _content(weights: dict[str, Tensor], decoder: str | None) -> str:
    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in weights)

    if has('image_projection.'):
        return 'MaskCLIP'
    if decoder or has('decoder_', 'neck.decoder_', 'decoder.decoder_'):
        return 'pretraining'
    if has('roi_head.', 'rpn_head.', 'decode_head.', 'bbox_head.'):
        return 'detector or segmentor'
    if has('neck.bn.', 'head.0.'):
        return 'linear probe'
    if has('backbone.ln2.', 'fc_norm.'):
        return 'classifier on the mean token'
    return 'classifier on the class token' if has('head.', 'classifier.') else 'encoder'


def _rename(
    weights: dict[str, Tensor], rows: list[tuple], source: str, target: str, encoder_only: bool
) -> dict[str, Tensor]:
    rows = [row for row in rows if row[COLUMN[source]]]
    patterns = [(_regex(row[COLUMN[source]]), row) for row in rows]
    renamed = {}
    for key, value in weights.items():
        found = ((match, row) for regex, row in patterns if (match := regex.fullmatch(key)))
        match, row = next(found, (None, None))
        if match is None:
            part = next((part for pattern, part in OTHER_VITS.items() if re.fullmatch(pattern, key)), None)
            if part:
                raise InputError(f'{key!r} is of {part}, which a MILANViT does not have; give a ViT without it.')
            raise InputError(f'The key {key!r} is unknown, no weight of {TITLE[source]} has this name; remove it.')
        of_encoder = row[0].startswith('backbone.')
        if encoder_only and not of_encoder:
            continue
        name = row[COLUMN[target]]
        if name is None or (target == 'timm' and row[0].startswith('neck.')):
            remedy = 'choose another layout'
            if not of_encoder:
                remedy = f'convert the encoder alone (--encoder-only), or {remedy}'
            raise InputError(f'{TITLE[target]} has no place for {key!r}; {remedy}.')
        for value_in_name in match.groups():
            name = re.sub(r'[#*]', value_in_name, name, count=1)
        renamed[name] = value
    return renamed


def _regex(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r'\#', r'(\d+)').replace(r'\*', '([a-z_]+)'))


def _join_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's query, key and value as one ``qkv``, in the place of the query."""
    joined = {}
    for key, value in weights.items():
        match = _QUERY_KEY_VALUE.fullmatch(key)
        if match is None:
            joined[key] = value
            continue
        names = [f'{match[1]}.{part}.{match[3]}' for part in ('query', 'key', 'value')]
        missing = [name for name in names if name not in weights]
        if missing:
            raise InputError(f'{missing[0]!r} is missing; give query, key and value together.')
        joined.setdefault(f'{match[1]}.qkv.{match[3]}', torch.cat([weights[name] for name in names]))
    return joined


def _split_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of ``_join_qkv``."""
    split = {}
    for key, value in weights.items():
        if '.qkv.' not in key:
            split[key] = value
            continue
        for part, piece in zip(('query', 'key', 'value'), value.chunk(3), strict=True):
            split[key.replace('.qkv.', f'.{part}.')] = piece
    return split


# -- open_clip's names, which are OpenAI's: MaskCLIP's towers there, and a CLIP's image tower back

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

    The bias of the patch embedding, which open_clip's ViT lacks, moves into the positions, to which it is added anyway.

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
