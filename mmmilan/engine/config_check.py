"""Mistakes in a config that MMEngine would not see, or only after minutes, and then in hundreds of lines."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mmmilan.errors import InputError

LOADERS = dict(
    train=('train_dataloader', 'val_dataloader', 'val_evaluator'),
    test=('test_dataloader', 'test_evaluator', 'test_cfg'),  # test_cfg has the labelled images of k-NN
)


def unread_options(cfg: Config, options: Iterable[str]) -> Iterator[str]:
    """A sentence for each option whose key nothing reads.

    A part (``optim_wrapper``) takes keys that its config does not have yet; the config itself takes those of MMEngine's
    runner. Within a part, a key that is almost one of its keys is taken for that one, written wrongly.

    Args:
        cfg: The config before the options are merged.
        options: Their keys, such as 'model.backbone.arch'.
    """
    of_runner = set(inspect.signature(Runner.__init__).parameters) - {'self'}
    for option in options:
        part: Any = cfg.to_dict()
        for depth, name in enumerate(option.split('.')):
            if not isinstance(part, Mapping):
                break
            known = [*part, *(of_runner if depth == 0 else ())]
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0 if depth == 0 else 0.8)
                if nearest:
                    fixed = '.'.join([*option.split('.')[:depth], nearest[0], *option.split('.')[depth + 1 :]])
                    yield f'Nothing reads {option}; the nearest key is {fixed}.'
                break
            part = part.get(name)


def check_data(cfg: Config, task: str) -> None:
    """Check that the folders and annotations of the data sets of a run are there.

    Args:
        cfg: The config.
        task: 'train' or 'test'.

    Raises:
        InputError: naming the first that is missing, and its option.
    """
    for name in LOADERS[task]:
        for option, part in _parts(cfg.get(name), name):
            _check_part(option, part)


def _check_part(option: str, part: Mapping[str, Any]) -> None:
    root = part.get('data_root') or ''
    if not isinstance(root, str) or '://' in root or part.get('backend_args'):
        return  # elsewhere than in files
    if root and not os.path.isdir(root):
        raise InputError(f'The data folder {root} does not exist; set {option}.data_root to that of your data.')
    file = part.get('ann_file')
    if isinstance(file, str) and file and '://' not in file and not Path(root, file).is_file():
        raise InputError(f'The annotations {Path(root, file)} do not exist; set {option}.ann_file to their file.')


def _parts(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict in a part of a config, with its dotted name."""
    if isinstance(value, Mapping):
        yield name, value
        for key, inner in value.items():
            yield from _parts(inner, f'{name}.{key}')
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _parts(inner, f'{name}.{i}')
