"""What the config of a model with a head says of its task: which it is, how images are read, and the classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from mmmilan.errors import InputError

ANNOTATIONS = re.compile(r'Load\w*(Annotation|LabelMap|Proposal)')  # types of the steps that load them


def config_task(config: Config) -> str:
    """The task: classification, detection or segmentation."""
    return dict(mmdet='detection', mmseg='segmentation').get(config.get('default_scope'), 'classification')


def test_dataset(config: Config) -> dict[str, Any]:
    """The part of a config that says how images are read in evaluation: within wrappers, the first one's.

    Raises:
        InputError: there is none.
    """
    for name in ('test_dataloader', 'val_dataloader'):
        part = (config.get(name) or {}).get('dataset')
        while isinstance(part, Mapping) and 'pipeline' not in part:
            part = part.get('dataset') or (part.get('datasets') or [None])[0]
        if part:
            return part
    raise InputError(
        'The config has no test_dataloader with a pipeline, which says how images are read; give one that has.'
    )


def dataset_meta(config: Config) -> dict[str, Any]:
    """The metainfo of the config's data set, such as the names of its classes."""
    dataset = test_dataset(config)
    with DATASETS.switch_scope_and_registry(None) as registry:
        kind = registry.get(dataset.type) if isinstance(dataset.get('type'), str) else dataset.get('type')
        own = getattr(kind, 'METAINFO', {})
    return own | dict(dataset.get('metainfo') or {})


def loads_annotations(step: Mapping[str, Any]) -> bool:
    """Whether a step of a pipeline loads annotations."""
    return bool(ANNOTATIONS.search(str(step['type'])))
