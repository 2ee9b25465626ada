"""A teacher by its name: the one grammar, for configs, functions and commands."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import open_clip
import timm
from torch import nn

from mmmilan.checkpoints.foreign_config import of_another_file
from mmmilan.checkpoints.zoo import resolve_checkpoint, zoo_models
from mmmilan.errors import InputError, shown
from mmmilan.failures import build_errors
from mmmilan.registry import MODELS
from mmmilan.teachers.base import Teacher
from mmmilan.teachers.clip_source import CONFIG as CLIP_CONFIG
from mmmilan.teachers.timm import CONFIG as TIMM_CONFIG
from mmmilan.teachers.weights import HUB, LOCAL, hub_file, read_weights

CLIP, TIMM = 'mmmilan.OpenCLIPTeacher', 'mmmilan.TimmTeacher'
LIBRARIES = {'open_clip': CLIP, 'timm': TIMM}
FORMS = (
    'give MODEL:TAG or MODEL:FILE of open_clip, a ViT of timm, a file, a URL, a MaskCLIP of the zoo, a folder '
    f'({LOCAL}FOLDER) or {HUB}REPOSITORY'
)


def build_teacher(teacher: str | os.PathLike | dict[str, Any] | Teacher) -> Teacher:
    """Build a teacher from its name or its config; a teacher is returned as it is.

    Raises:
        InputError: there is no such teacher, or its config does not fit.
    """
    if isinstance(teacher, nn.Module):
        return teacher
    with of_another_file(), build_errors():
        return MODELS.build(teacher_config(teacher))


def teacher_config(teacher: str | os.PathLike | dict[str, Any]) -> dict[str, Any]:
    """The config of a teacher from its name.

    Args:
        teacher: One of

            * ``MODEL:TAG`` of open_clip, such as 'ViT-B-16-SigLIP2:webli'; ``MODEL:FILE`` with a file or URL of its
              weights;
            * a ViT of timm, such as 'vit_base_patch16_224.dino'; ``MODEL:FILE``;
            * a file or URL alone: a checkpoint of :class:`MaskCLIP`, or a CLIP that says what it is, see
              :class:`OpenCLIPTeacher`; a MaskCLIP of the zoo;
            * ``hf-hub:REPOSITORY``, ``local-dir:FOLDER`` or a folder, written by open_clip or timm;
            * the config of a teacher.

            ``open_clip:`` or ``timm:`` before it names the library, where both have the model.

    Returns:
        The config; it feeds the teacher the pixels it was trained on. Files have their absolute paths.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(teacher, dict):
        if not teacher.get('type'):
            raise InputError(f'The teacher {shown(teacher)} has no type; name one, such as {CLIP}.')
        return dict(teacher)
    name = os.fspath(teacher)
    library, separator, rest = name.partition(':')
    if not separator or library not in LIBRARIES or os.path.exists(name):
        library, rest = None, name
    if rest.startswith((HUB, LOCAL)) or os.path.isdir(rest):
        return of_folder(rest, library)
    if weights := find_weights(rest):
        return dict(type=CLIP, pretrained=weights)
    model, separator, weights = rest.partition(':')
    if library != 'timm' and (separator or not is_timm(model)) and is_open_clip(model):
        return dict(type=CLIP, model=model, pretrained=find_weights(weights) or weights or choose_tag(model))
    if library != 'open_clip' and is_timm(model):
        return dict(type=TIMM, model=model) | (dict(pretrained=existing(weights, name)) if separator else {})
    raise InputError(f'The teacher {name} is unknown{nearest(model)}; {FORMS}.')


def names_teacher(name: str) -> bool:
    """Whether a name is a teacher's, where it may also be an encoder's: a file, a URL, a name of the zoo, a run."""
    if '://' in name or os.path.isfile(name):
        return any(key.endswith('visual.class_embedding') for key in read_weights(str(resolve_checkpoint(name))))
    return ':' in name or os.path.isdir(name) or is_timm(name)


def is_open_clip(model: str) -> bool:
    return model.replace('/', '-') in open_clip.list_models()


def is_timm(model: str) -> bool:
    return '/' not in model and timm.is_model(model.partition('.')[0])


def of_folder(name: str, library: str | None) -> dict[str, Any]:
    """The config of a teacher in a folder or a repository, by the config that is in it."""
    configs = {'open_clip': CLIP_CONFIG, 'timm': TIMM_CONFIG}
    configs = {library: configs[library]} if library else configs
    if name.startswith(HUB):
        found = Path(hub_file(name.removeprefix(HUB), list(configs.values()))).name
    else:
        folder = Path(name.removeprefix(LOCAL)).expanduser().absolute()
        found = next((config for config in configs.values() if (folder / config).is_file()), None)
        if found is None:
            raise InputError(f'{folder} has no {" or ".join(configs.values())}; give a folder of open_clip or timm.')
        name = f'{LOCAL}{folder}'
    return dict(type=CLIP if found == CLIP_CONFIG else TIMM, model=name)


def find_weights(text: str) -> str | None:
    """The file that a path, a URL or a name of the zoo stands for, downloaded if it is not here; None: it is no such.

    Raises:
        InputError: the zoo has it and it cannot teach, or it cannot be downloaded.
    """
    model = zoo_models().get(text)
    if model and model.collection != 'MaskCLIP':
        raise InputError(f'{text} is an encoder and no teacher; {FORMS}.')
    if model or '://' in text or Path(text).expanduser().is_file():
        return str(resolve_checkpoint(text).absolute())
    return None


def existing(weights: str, name: str) -> str:
    """:func:`find_weights` of what must be a file."""
    found = find_weights(weights)
    if found is None:
        raise InputError(f'The teacher {name} names the weights {weights!r}, which are no file; correct the path.')
    return found


def choose_tag(model: str) -> str:
    """Always raises an :class:`InputError` with the tags of a model of open_clip, of which one must be named."""
    tags = open_clip.list_pretrained_tags_by_model(model.replace('/', '-'))
    tags = ', '.join(f'{model}:{tag}' for tag in tags) or f'{model}:FILE, as open_clip has no weights of it'
    raise InputError(f'The teacher {model} names no weights; choose {tags}.')


def nearest(model: str) -> str:
    """The known names that are most like one, in words."""
    near = difflib.get_close_matches(model, [*open_clip.list_models(), *timm.list_models('vit*', pretrained=True)], 3)
    return f' (near it: {", ".join(near)})' if near else ''
