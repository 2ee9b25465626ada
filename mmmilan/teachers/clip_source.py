"""What a CLIP is made of: open_clip's config of it, its weights, how its images were normalised, its tokenizer.

A state dict does not hold the activation that it was trained with, GELU or QuickGELU. OpenAI's own files are known by
numbers that only they hold; else a tag of open_clip, ``open_clip_config.json`` beside the file, the config in a
checkpoint of :class:`MaskCLIP`, or the name of the model says it. It is never guessed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from mmengine.config import ConfigDict
from open_clip.model import _build_vision_tower  # the public way makes the text tower as well
from torch import Tensor, nn

from mmmilan.building import arch_sizes
from mmmilan.checkpoints.config import NoConfig, own_config
from mmmilan.checkpoints.io import check_values
from mmmilan.checkpoints.layouts import NORM_EPS, is_maskclip, to_open_clip
from mmmilan.errors import InputError, warn
from mmmilan.files import first_line
from mmmilan.teachers.base import check_statistics, statistics_of
from mmmilan.teachers.weights import HUB, LOCAL, hub_file, local_folder, read_weights, weights_in

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of RGB images in [0, 1]

CONFIG = 'open_clip_config.json'
HUB_FILES = ('open_clip_model.safetensors', 'open_clip_pytorch_model.bin')
# OpenAI's archives, and state dicts made from them, hold these as tensors; open_clip's files do not.
OPENAI_NUMBERS = {'input_resolution', 'context_length', 'vocab_size'}
VOCABULARY = 49408  # of CLIP's tokenizer
# What a file whose shapes or settings do not fit raises while its tower is built.
MISFITS = (
    LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ArithmeticError,
)  # fmt: skip


@dataclass(frozen=True)
class CLIPSource:
    """A CLIP that can be built.

    Attributes:
        name: What messages call it.
        config: open_clip's config: ``embed_dim``, ``vision_cfg``, ``quick_gelu``, and ``text_cfg`` or
            ``text_heads`` where they are known.
        statistics: Mean and standard deviation of the images that it was trained on, of RGB in [0, 1].
        tokenizer: What ``open_clip.get_tokenizer`` takes; None is CLIP's own.
        read: Gives the state dict in open_clip's names, downloaded if it is not here, and the path of its file. None:
            the weights are random.
    """

    name: str
    config: dict[str, Any]
    statistics: Statistics
    tokenizer: str | None
    read: Callable[[], tuple[dict[str, Tensor], str]] | None


def find_source(model: str | None, pretrained: str | None, head_width: int = 64) -> CLIPSource:
    """Find what ``OpenCLIPTeacher`` takes; weights by name are downloaded later.

    Args:
        model: Name of open_clip, ``hf-hub:REPOSITORY`` or ``local-dir:FOLDER``; None for a file alone.
        pretrained: Tag of open_clip or file; None for random weights, or for those of the repository or folder.
        head_width: Width of the attention heads of a file alone that holds no config.

    Raises:
        InputError: there is no such model, tag or file; or the activation of a file is not known.
    """
    if model is None:
        return of_file(pretrained, head_width)
    if model.startswith((HUB, LOCAL)):
        return of_folder(model, pretrained)
    return of_name(model.replace('/', '-'), pretrained)  # open_clip takes ViT-B/16 too


# -- by name


def of_name(model: str, pretrained: str | None) -> CLIPSource:
    """A model of open_clip with a tag, a file or random weights."""
    config, quick_gelu, statistics, read = find_config(model, pretrained), None, common_statistics(model), None
    if pretrained in open_clip.list_pretrained_tags_by_model(model):
        published = open_clip.pretrained.get_pretrained_cfg(model, pretrained)
        quick_gelu, statistics = published.get('quick_gelu', False), (published['mean'], published['std'])
        read = partial(read_published, published)
    elif pretrained is not None:
        weights, beside = read_weights(pretrained), config_beside(pretrained)
        if not OPENAI_NUMBERS.isdisjoint(weights):
            quick_gelu, statistics = True, openai_statistics()
        elif beside:
            quick_gelu, statistics = beside['model_cfg'].get('quick_gelu', False), statistics_in(beside, pretrained)
        read = partial(tuple, (weights, pretrained))
    if quick_gelu is not None and quick_gelu != config.get('quick_gelu', False):
        warn(
            f'OpenCLIPTeacher {model}: {pretrained} was trained {"with" if quick_gelu else "without"} QuickGELU, and '
            'so it is run, although the name of the model says otherwise.'
        )
        config['quick_gelu'] = quick_gelu
    return CLIPSource(model, config, statistics, model, read)


def find_config(model: str, pretrained: str | None) -> dict[str, Any]:
    """open_clip's config of a model.

    Raises:
        InputError: it has no such model or tag.
    """
    if model not in open_clip.list_models():
        raise InputError(f'open_clip has no model {model!r}; open_clip.list_models() gives its names.')
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is not None and pretrained not in tags and not os.path.isfile(pretrained):
        raise InputError(
            f'pretrained={pretrained!r} is neither a file nor an open_clip tag of {model}; its tags are {tags}.'
        )
    return open_clip.get_model_config(model)


def read_published(published: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The weights of an open_clip tag, downloaded if they are not here."""
    repo, _, name = published['hf_hub'].rpartition('/')
    names = [f'{name[:-4]}.safetensors', name] if name else HUB_FILES
    path = hub_file(repo, names)
    return read_weights(path), path


def common_statistics(model: str) -> Statistics:
    """How the images of a model were normalised whose weights have no tag: as those of most of its tags."""
    tags = [
        open_clip.pretrained.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)
    ]
    found = [(tuple(tag['mean']), tuple(tag['std'])) for tag in tags]
    return max(found, key=found.count) if found else openai_statistics()


def openai_statistics() -> Statistics:
    """Those of OpenAI's CLIP, which are open_clip's default."""
    return open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


# -- by the config in a folder or a repository


def of_folder(model: str, pretrained: str | None) -> CLIPSource:
    """What open_clip wrote to a folder or to a repository of the Hugging Face Hub."""
    if model.startswith(HUB):
        repo = model.removeprefix(HUB)
        path = Path(hub_file(repo, [CONFIG]))
        find = partial(hub_file, repo, HUB_FILES)
    else:
        path = local_folder(model) / CONFIG
        find = partial(weights_in, path.parent, HUB_FILES)

    def read() -> tuple[dict[str, Tensor], str]:
        file = pretrained or find()
        return read_weights(file), file

    return of_config(read_config(path), model, read)


def of_config(content: dict[str, Any], tokenizer: str, read: Callable[[], tuple[dict[str, Tensor], str]]) -> CLIPSource:
    """A CLIP by the content of its ``open_clip_config.json``."""
    try:
        with torch.device('meta'):
            new_visual(content['model_cfg'])
    except MISFITS as error:
        raise InputError(
            f'{CONFIG} of {tokenizer} is no config of open_clip ({first_line(error)}); correct it.'
        ) from error
    return CLIPSource(tokenizer, content['model_cfg'], statistics_in(content, tokenizer), tokenizer, read)


def config_beside(path: str) -> dict[str, Any] | None:
    """The content of ``open_clip_config.json`` beside a file of weights; None where there is none."""
    config = Path(path).absolute().with_name(CONFIG)
    return read_config(config) if config.is_file() else None


def read_config(path: Path) -> dict[str, Any]:
    """The content of an ``open_clip_config.json``.

    Raises:
        InputError: it cannot be read, describes no model, or does not say if it has QuickGELU.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f'{path} cannot be read ({first_line(error)}); give the folder that open_clip wrote.'
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get('model_cfg'), dict):
        raise InputError(f'{path} describes no model (model_cfg); give the folder that open_clip wrote.')
    if not isinstance(content['model_cfg'].get('quick_gelu', False), bool):
        raise InputError(f'quick_gelu of {path} is neither true nor false; correct it.')
    return content


def statistics_in(content: dict[str, Any], source: str) -> Statistics:
    """The normalisation in an ``open_clip_config.json``; like open_clip, OpenAI's where it says nothing.

    Raises:
        InputError: it is not three numbers each.
    """
    settings = content.get('preprocess_cfg') or {}
    mean, std = (settings.get(key) or own for key, own in zip(('mean', 'std'), openai_statistics(), strict=True))
    return check_statistics(mean, std, f'{CONFIG} of {source}', 1)


# -- by a file alone


def of_file(path: str, head_width: int) -> CLIPSource:
    """A CLIP from a file alone: of OpenAI, of :class:`MaskCLIP`, or with its config beside it.

    Raises:
        InputError: it is none of these, or is damaged.
    """
    weights = read_weights(path)
    if is_maskclip(weights):
        return of_maskclip(path, weights, head_width)
    if not OPENAI_NUMBERS.isdisjoint(weights):
        config = dict(quick_gelu=True, **config_of_shapes(weights, path, head_width))
        return CLIPSource(path, config, openai_statistics(), None, partial(tuple, (weights, path)))
    if content := config_beside(path):
        return of_config(content, f'{LOCAL}{Path(path).absolute().parent}', partial(tuple, (weights, path)))
    names = models_like(config_of_shapes(weights, path, head_width))
    raise InputError(
        f'{path} does not say whether it was trained with GELU or with QuickGELU; name its model as MODEL:FILE (model= '
        f'in a config), such as {" or ".join(names)}, or put its {CONFIG} beside it.'
    )


def models_like(sizes: dict[str, Any]) -> list[str]:
    """Two models of open_clip for an example, of these sizes if there are such: with GELU and with QuickGELU."""
    wanted = {key: sizes['vision_cfg'][key] for key in ('width', 'layers', 'patch_size', 'image_size')}
    like: dict[bool, list[str]] = {False: [], True: []}
    for model in open_clip.list_models():
        config = open_clip.get_model_config(model)
        of_these_sizes = config['embed_dim'] == sizes['embed_dim'] and wanted.items() <= config['vision_cfg'].items()
        if of_these_sizes and 'hf_model_name' not in config['text_cfg']:
            like[config.get('quick_gelu', False)].append(model)
    return [min(names, key=len) for names in like.values() if names] or ['ViT-B-16', 'ViT-B-16-quickgelu']


def of_maskclip(path: str, weights: dict[str, Tensor], head_width: int) -> CLIPSource:
    """A checkpoint of :class:`MaskCLIP`, whose config, if it holds one, says what the shapes do not."""
    vision, text, settings = {}, {}, None
    try:
        model = own_config(path).model
    except NoConfig:
        model = None
    try:
        if model:
            vision, text = of_backbone(model.backbone), dict(text_heads=model.text.heads)
            settings = model.get('data_preprocessor')
        weights = to_open_clip(weights)
    except MISFITS as error:
        raise InputError(
            f'{path} looks like a MaskCLIP but does not fit ({first_line(error)}); give a checkpoint of mmmilan.'
        ) from error
    head_width = vision.pop('head_width', head_width)
    config = config_of_shapes(weights, path, head_width, no_ln_pre=True, norm_kwargs=dict(eps=NORM_EPS), **vision)
    return CLIPSource(path, config | text, statistics_of(settings), None, partial(tuple, (weights, path)))


def of_backbone(backbone: ConfigDict) -> dict[str, Any]:
    """What the config of an encoder tells of open_clip's: width of the attention heads, image size."""
    arch = arch_sizes(backbone.arch)
    return dict(head_width=arch['embed_dims'] // arch['num_heads'], image_size=backbone.get('img_size', 224))


def config_of_shapes(weights: dict[str, Tensor], path: str, head_width: int, **vision: Any) -> dict[str, Any]:
    """open_clip's config of an image tower, read off the shapes of its weights.

    Args:
        weights: A state dict in open_clip's names, whatever prefix the tower has.
        path: Its file, for messages.
        head_width: Width of the attention heads, which the shapes do not tell.
        vision: Settings that are known; the image is a square by default.

    Raises:
        InputError: there is no tower, or its weights do not fit each other.
    """
    prefix = visual_prefix(weights, path)
    own = ('class_embedding', 'positional_embedding', 'proj', 'conv1.', 'ln_pre.', 'transformer.', 'ln_post.')
    tower = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    tower = {key: value for key, value in tower.items() if key.startswith(own)}
    check_values(tower, path)
    try:
        config = sizes_of(tower, path, head_width, vision)
        with torch.device('meta'):  # without the memory that a forged shape would ask for
            expected = new_visual(config).state_dict()
        wrong = [key for key in expected.keys() | tower.keys() if shape(expected, key) != shape(tower, key)]
    except InputError:
        raise
    except MISFITS as error:
        raise InputError(
            f'{path} looks like a CLIP image tower but does not fit ({first_line(error)}); name its model.'
        ) from error
    if wrong:
        key = min(wrong)
        raise InputError(
            f'{path} looks like a CLIP image tower but does not fit: {key} is {shape(tower, key) or "missing"}, '
            f'where {shape(expected, key) or "none"} belongs; name its model.'
        )
    return config


def visual_prefix(weights: dict[str, Tensor], path: str) -> str:
    """What stands before the names of the image tower's weights."""
    prefixes = [key.removesuffix('class_embedding') for key in weights if key.endswith('class_embedding')]
    if len(prefixes) != 1 or f'{prefixes[0]}conv1.weight' not in weights or f'{prefixes[0]}proj' not in weights:
        raise InputError(
            f"{path} is not in OpenAI's CLIP layout (no visual.class_embedding, visual.conv1.weight and "
            f'visual.proj; it begins with {", ".join(list(weights)[:3])}); name its open_clip model as well.'
        )
    return prefixes[0]


def sizes_of(tower: dict[str, Tensor], path: str, head_width: int, vision: dict[str, Any]) -> dict[str, Any]:
    """open_clip's config of the weights of an image tower, without prefix."""
    width, _, _, patch_size = tower['conv1.weight'].shape
    if width % head_width:
        raise InputError(f'The tower in {path} is {width} wide, no multiple of head_width={head_width}; correct it.')
    sizes = dict(
        image_size=math.isqrt(len(tower['positional_embedding']) - 1) * patch_size,
        patch_size=patch_size,
        width=width,
        layers=count_blocks(tower),
        head_width=head_width,
        mlp_ratio=tower['transformer.resblocks.0.mlp.c_fc.weight'].shape[0] / width,
    )
    return dict(embed_dim=tower['proj'].shape[1], vision_cfg=sizes | vision)


def text_sizes(weights: dict[str, Tensor], path: str, head_width: int, heads: int | None = None) -> dict[str, Any]:
    """open_clip's config of a text tower, read off the shapes of its weights, which have no prefix.

    The number of attention heads, which they do not tell, follows from ``head_width`` unless it is known.

    Raises:
        InputError: it is no tower of CLIP's own kind.
    """
    vocabulary, width = weights['token_embedding.weight'].shape
    if vocabulary != VOCABULARY:
        raise InputError(f"{path} knows {vocabulary} tokens and CLIP's tokenizer {VOCABULARY}; give a CLIP of English.")
    if heads is None and width % head_width:
        raise InputError(
            f'The text tower in {path} is {width} wide, no multiple of head_width={head_width}; correct it.'
        )
    return dict(
        context_length=len(weights['positional_embedding']),
        width=width,
        heads=heads or width // head_width,
        layers=count_blocks(weights),
    )


def count_blocks(tower: dict[str, Tensor]) -> int:
    return len({match[1] for key in tower if (match := re.match(r'transformer\.resblocks\.(\d+)\.', key))})


def shape(weights: dict[str, Tensor], key: str) -> list[int] | None:
    """The shape of a weight, None where it is missing."""
    return list(weights[key].shape) if key in weights else None


def new_visual(config: dict[str, Any]) -> nn.Module:
    """The visual tower alone, with random weights."""
    vision = config['vision_cfg'] | dict(timm_model_pretrained=False)
    return _build_vision_tower(config['embed_dim'], vision, config.get('quick_gelu', False))
