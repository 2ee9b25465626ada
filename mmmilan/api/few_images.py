"""The recipe of ``mmmilan.pretrain`` for few images, and a sentence on the recipe of any run."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log

from mmmilan.building import dotted
from mmmilan.checkpoints.config import CALL, call_of
from mmmilan.components import type_name
from mmmilan.errors import count
from mmmilan.teachers.base import pair

FEW_IMAGES = 100_000  # up to which the recipe for few images is used; it was measured on 500, 4,167 and 25,000
CLASS_SHARE = 1 / 3  # of the class token in the loss of that recipe
PARTS = ('model.masking.', 'model.neck.', 'model.head.', 'train_dataloader.sampler.crops.')  # that a recipe sets
REASONS = {
    'few-images': ' On CIFAR-10 this was better than the published method.',
    'milan': ' This is the published method.',
}
EPOCHS_OF_A_CROP = 8  # in that recipe: as many as it may come again without loss (docs/efficiency.md)


def set_recipe(config: Config, recipe: str | None, num_images: int, changes: Mapping[str, Any]) -> None:
    """Keep the published method ('milan'), or change what was better on folders of few images (docs/own_images.md).

    Args:
        config: The config, changed in place.
        recipe: Its name; None for the one of so many images.
        num_images: How many are trained on.
        changes: What the user changes, which no recipe sets.
    """
    name, own = recipe or ('few-images' if num_images <= FEW_IMAGES else 'milan'), list(dotted(changes))
    patches = float(np.prod(config.model.neck.num_patches))
    weight = float(f'{patches * CLASS_SHARE / (1 - CLASS_SHARE):.3g}')
    few = {
        'model.masking.type': 'mmmilan.RandomMasking',
        'model.masking.mask_ratio': 0.5,
        'model.neck.decoder_depth': 1,
        'model.head.cls_token': weight,
    }
    for key, value in few.items() if name == 'few-images' else ():
        part = key.rpartition('.')[0]
        if not any(f'{key}.'.startswith(f'{each}.') or each == f'{part}.type' for each in own):
            config.merge_from_dict({key: value})
    if name == 'few-images':
        config.default_hooks.teacher_cache = dict(type='mmmilan.TeacherCacheHook')
    changed = any(f'{key}.'.startswith(PARTS) and not f'{key}.'.startswith('model.head.teacher.') for key in own)
    config[CALL] = dict(
        commands=[], recipe=dict(name=name, asked=recipe is not None, images=num_images, changed=changed)
    )


def repeat_crops(config: Config, folder: Path) -> None:
    """Let crops come again in the recipe for few images, if there is room for what the teacher gives of each.

    A user decides otherwise by ``train_dataloader.sampler.crops``, a number or None, or by the hook.

    Args:
        config: The config with the user's changes, changed in place.
        folder: Where the run writes.
    """
    loader, hook = config.train_dataloader or {}, config.default_hooks.get('teacher_cache')
    sampler, size = loader.get('sampler') or {}, cache_size(config)
    epochs = (config.train_cfg or {}).get('max_epochs', 0)
    crops = math.ceil(epochs / EPOCHS_OF_A_CROP)
    if hook and size and 'crops' not in sampler and crops < epochs:
        if crops * size <= room_for_files(Path(hook.get('cache') or folder)):
            sampler.crops = config[CALL]['recipe']['crops'] = crops
        else:
            print_log(
                f'What the teacher gives of {count(crops, "crop")} of each image would take {crops * size / 1e9:.1f} '
                'GB, more than half of the free disk or of the memory: it runs at each step.',
                logger='current',
            )


def drop_crops(config: Config) -> None:
    """Leave out the number of crops that :func:`repeat_crops` chose; one of the user's own stays."""
    recipe, sampler = call_of(config).get('recipe') or {}, (config.train_dataloader or {}).get('sampler') or {}
    crops = recipe.pop('crops', None)
    if crops and sampler.get('crops') == crops:
        del sampler['crops']


def keep_repeated(config: Config) -> None:
    """Add the hook to a config with crops that come again, without which nothing is gained, unless it names the hook.

    Args:
        config: The config with the user's changes, changed in place.
    """
    sampler, hooks = (config.train_dataloader or {}).get('sampler') or {}, config.get('custom_hooks') or []
    named = 'teacher_cache' in config.default_hooks or 'TeacherCacheHook' in map(type_name, hooks)
    if sampler.get('crops') and not named:
        config.default_hooks.teacher_cache = dict(type='mmmilan.TeacherCacheHook')


def cache_size(config: Config) -> int:
    """Bytes of what the teacher gives of one crop of each image, but for a hundredth; 0 where it is not kept."""
    model, loader = config.model, config.train_dataloader or {}
    dataset = loader.get('dataset') or {}
    parts = [model.get('head'), dataset, loader.get('sampler'), *dataset.get('pipeline', [])]
    usual = ['CLIPTarget', 'ImageSources', 'ReproducibleSampler', 'LoadRandomResizedCrop', 'PackInputs']
    if [type_name(part or {}) for part in parts] != usual or 'meta_keys' in parts[-1]:
        return 0
    tokens = 1 + int(np.prod(pair(model.backbone.img_size))) // model.backbone.patch_size**2
    images = (call_of(config).get('recipe') or {}).get('images', 0)
    return images * tokens * ((model.get('neck') or {}).get('predict_feature_dim') or 0)


def room_for_files(folder: Path) -> float:
    """The bytes that files may take which a run reads all the time: half of the free disk, or of the memory if less."""
    disk = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return min(shutil.disk_usage(disk).free, memory) / 2


def about_recipe(config: Config) -> str:
    """A sentence or two on what a run trains with, and by which recipe and why if ``mmmilan.pretrain`` chose it."""
    masking, neck, head = (config.model.get(part) or {} for part in ('masking', 'neck', 'head'))
    weight = float(head.get('cls_token', head.get('type', '').endswith('CLIPTarget')))
    kind = type_name(masking)
    what = {'RandomMasking': 'random masks', 'SemanticAwareMasking': 'semantic-aware masks'}.get(kind, kind)
    what += f' of {masking.mask_ratio:.0%} of the patches' if 'mask_ratio' in masking else ''
    what += f'; a decoder of {count(neck.decoder_depth, "block")}' if 'decoder_depth' in neck else ''
    crops = ((config.get('train_dataloader') or {}).get('sampler') or {}).get('crops')
    what += f'; {count(crops, "crop")} of each image' if crops else ''
    what += f'; the class token weighs in the loss as {weight:g} patch{"es" * (weight != 1)}' * (weight > 0)
    if not (recipe := call_of(config).get('recipe')):
        return f'{what[0].upper()}{what[1:]}.'
    side = 'up to' if recipe['name'] == 'few-images' else 'above'
    why = 'as asked for' if recipe['asked'] else f'the default {side} {FEW_IMAGES:,} images, here {recipe["images"]:,}'
    reason = '' if recipe.get('changed') else REASONS[recipe['name']]
    return f'Recipe {recipe["name"]}, {why}: {what}.{reason}'
