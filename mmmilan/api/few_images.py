"""The recipe of ``mmmilan.pretrain`` for few images, what it needs room for, and what is said of a run's recipe."""

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
PARTS = ('model.masking.', 'model.neck.', 'model.head.')  # of a model that a recipe sets
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
    changed = any(f'{key}.'.startswith(PARTS) and not f'{key}.'.startswith('model.head.teacher.') for key in own)
    config[CALL] = dict(
        commands=[], recipe=dict(name=name, asked=recipe is not None, images=num_images, changed=changed)
    )


def repeat_crops(config: Config, folder: Path) -> None:
    """Let crops come again in the recipe for few images, if there is room for what the teacher gives of each.

    A user decides otherwise by ``train_dataloader.sampler.crops``, a number or None.

    Args:
        config: The config with the user's changes, changed in place.
        folder: Where the run writes.
    """
    model, loader, recipe = config.model, config.train_dataloader or {}, call_of(config)['recipe']
    parts = [type_name(part or {}) for part in (model.get('head'), loader.get('dataset'), loader.get('sampler'))]
    is_usual = parts == ['CLIPTarget', 'ImageSources', 'ReproducibleSampler'] and 'crops' not in loader.sampler
    epochs, crops = (config.train_cfg or {}).get('max_epochs', 0), usual_crops(config)
    if recipe['name'] == 'few-images' and is_usual and crops < epochs:
        tokens = 1 + int(np.prod(pair(model.backbone.img_size))) // model.backbone.patch_size**2
        size = crops * recipe['images'] * tokens * (model.neck.predict_feature_dim or 0)  # bytes, but for a hundredth
        if size <= room_for_files(folder):
            loader.sampler.crops = crops
        else:
            print_log(
                f'What the teacher gives of {count(crops, "crop")} of each image would take {size / 1e9:.1f} GB, more '
                'than half of the free disk or memory: it runs at each step.',
                logger='current',
            )


def usual_crops(config: Config) -> int:
    """How many crops of an image the recipe for few images has."""
    return math.ceil((config.train_cfg or {}).get('max_epochs', 0) / EPOCHS_OF_A_CROP)


def keep_teacher(config: Config) -> None:
    """Run the teacher once for each crop where crops come again, unless the user has set or removed the hook."""
    if ((config.train_dataloader or {}).get('sampler') or {}).get('crops'):
        config.default_hooks.setdefault('teacher_cache', dict(type='mmmilan.TeacherCacheHook'))


def room_for_files(folder: Path) -> float:
    """The bytes that files of a run may take which are read all the time: half of the free disk and of the memory."""
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
