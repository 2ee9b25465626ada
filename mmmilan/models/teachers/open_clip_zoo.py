"""What open_clip publishes: configs of its models, files of weights, and how images are normalised."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from mmengine.logging import print_log

from mmmilan.errors import InputError
from mmmilan.models.teachers.weights import hub_file


def find_config(model: str, pretrained: str | None) -> dict[str, Any]:
    """open_clip's config of a model.

    Raises:
        InputError: it has no such model or tag.
    """
    import open_clip

    if model not in open_clip.list_models():
        raise InputError(f'open_clip has no model {model!r}; open_clip.list_models() gives its names.')
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is not None and not os.path.exists(pretrained) and pretrained not in tags:
        raise InputError(
            f'pretrained={pretrained!r} is neither a file nor an open_clip tag of {model}; its tags are {tags}.'
        )
    return open_clip.get_model_config(model)


def published_file(model: str, tag: str) -> str:
    """The file of an open_clip tag, downloaded if it is not here."""
    import open_clip

    config = open_clip.get_model_config(model)
    published = open_clip.pretrained.get_pretrained_cfg(model, tag)
    if published.get('quick_gelu', False) != config.get('quick_gelu', False):
        print_log(
            f'OpenCLIPTeacher {model}: {tag} was trained {"with" if published.get("quick_gelu") else "without"} '
            'QuickGELU, and this model is not; choose the model of the other kind (its name ends in -quickgelu).',
            logger='current',
            level=logging.WARNING,
        )
    repo, _, name = published['hf_hub'].rpartition('/')
    name = name or 'open_clip_pytorch_model.bin'
    safe = 'open_clip_model.safetensors' if name == 'open_clip_pytorch_model.bin' else f'{name[:-4]}.safetensors'
    return hub_file(repo, [safe, name])


def mean_std(model: str, pretrained: str | None) -> tuple[Sequence[float], Sequence[float]]:
    """How the images of a model were normalised: by its tag, or by any of its tags, which agree."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    tag = pretrained if pretrained in tags else tags[0] if tags else None
    config = open_clip.pretrained.get_pretrained_cfg(model, tag) if tag else {}
    return config.get('mean', open_clip.OPENAI_DATASET_MEAN), config.get('std', open_clip.OPENAI_DATASET_STD)
