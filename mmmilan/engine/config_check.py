"""Find mistakes in a config that MMEngine ignores, or reports late and with a stack trace."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmmilan.errors import InputError
from mmmilan.files import first_line

LOADERS = dict(
    train=('train_dataloader', 'val_dataloader', 'val_evaluator'),
    test=('test_dataloader', 'test_evaluator', 'test_cfg'),  # test_cfg has the training images of k-NN
)
# How the errors of an empty data set begin, in MMEngine and in mmpretrain.
EMPTY = ('need at least one array to concatenate', 'Found 0 files')


def unread_options(cfg: Config, options: Iterable[str]) -> Iterator[str]:
    """Yield a warning for each option that has no effect.

    A top-level key must be in the config or an argument of MMEngine's runner. Within a part such as ``optim_wrapper``
    new keys are allowed, unless they look like a misspelling of an existing key.

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
    """Check that the folders and annotation files of the data sets exist.

    Args:
        cfg: The config.
        task: 'train' or 'test'.

    Raises:
        InputError: one is missing; names it and the option that sets it.
    """
    for name in LOADERS[task]:
        for option, part in _parts(cfg.get(name), name):
            _check_part(option, part)


def _check_part(option: str, part: Mapping[str, Any]) -> None:
    root = part.get('data_root') or ''
    if not isinstance(root, str) or '://' in root or part.get('backend_args'):
        return  # not on a local disk
    if root and not os.path.isdir(root):
        raise InputError(f'The data folder {root} does not exist; set {option}.data_root to your data.')
    file = part.get('ann_file')
    if isinstance(file, str) and file and '://' not in file and not Path(root, file).is_file():
        raise InputError(f'The annotations {Path(root, file)} do not exist; set {option}.ann_file to them.')


def _parts(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every dict in a part of a config with its dotted name."""
    if isinstance(value, Mapping):
        yield name, value
        for key, inner in value.items():
            yield from _parts(inner, f'{name}.{key}')
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _parts(inner, f'{name}.{i}')


def check_data_sets(runner: Runner) -> None:
    """Make a runner raise an ``InputError`` for a data set that is empty or cannot be built."""
    build = runner.build_dataloader

    def build_checked(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        if isinstance(dataloader, DataLoader):
            return build(dataloader, *args, **kwargs)
        with data_set_errors(dataloader['dataset']):
            loader = build(dataloader, *args, **kwargs)
            if not len(loader.dataset):
                raise ValueError(EMPTY[0])
        return loader

    runner.build_dataloader = build_checked


@contextmanager
def data_set_errors(dataset: Any) -> Iterator[None]:
    """Turn errors while a data set is built from its config ``dataset`` into an ``InputError``."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        message = first_line(error).partition('. ')[0]
        if message.startswith(EMPTY):
            fault = 'is empty'
        elif isinstance(error, (AssertionError, OSError)):
            fault = f'cannot be loaded ({message})'
        else:
            raise
        raise InputError(f'The data set {_describe(dataset)} {fault}; correct its options or its files.') from error


def _describe(dataset: Any) -> str:
    """The type of a data set and the options that locate its files; for a wrapper, those of the wrapped data set."""
    parts = [part for _, part in _parts(dataset, '') if 'data_root' in part or 'ann_file' in part]
    if not parts:
        return 'of the config'
    options = {name: parts[0].get(name) for name in ('data_root', 'ann_file', 'data_prefix', 'split', 'filter_cfg')}
    return f'{parts[0].get("type")} ({", ".join(f"{name}={value!r}" for name, value in options.items() if value)})'
