"""Checkpoint files, read as data and never as code.

A ``.pth`` file is a pickle, which can call any function while it is read. Here it is read with
``torch.load(weights_only=True)``, plus the few harmless types that MMEngine and MAE put into their checkpoints;
anything else is refused by name. MMEngine itself falls back to the full pickle: ``use_safe_loading`` ends that.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import pickletools
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mmmilan.errors import InputError
from mmmilan.files import atomic_write, first_line

# Where a checkpoint keeps its weights: MMEngine, MAE and the published repository, others.
_STATE_DICT_KEYS = ('state_dict', 'model', 'module', 'model_state_dict')


def load_checkpoint_file(
    path: str | os.PathLike, allow_pickle: bool = False, map_location: Any = 'cpu'
) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: a file of ``torch.save`` or a safetensors file; which of them is told by its content.
        allow_pickle: read a pickle that the safe reader refuses. It can then run any code: only for files that you
            would also run as a script.
        map_location: as for ``torch.load``.

    Returns:
        What was saved; for a safetensors file ``{'state_dict': ..., 'meta': ...}``.

    Raises:
        InputError: the file is missing, incomplete, of another kind, or would run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f'{path} is not a file; give the path of a checkpoint.')
    with path.open('rb') as file:
        start = file.read(9)
    if start[8:] == b'{':  # eight bytes of length, then a JSON header
        return _load_safetensors(path, map_location)
    if not start.startswith((b'PK\x03\x04', b'\x80')):
        raise InputError(
            f'{path} is neither a PyTorch nor a safetensors file (it begins with {start[:8]!r}); give a checkpoint.'
        )
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_pickle:
            raise InputError(_refusal(path, error)) from None
        checkpoint = torch.load(path, map_location=map_location, weights_only=False)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f'{path} is incomplete or damaged ({first_line(error)}); copy or download it again.'
        ) from error
    if not isinstance(checkpoint, dict):
        raise InputError(
            f'{path} holds a {type(checkpoint).__name__} in place of a dictionary of weights; give a checkpoint.'
        )
    return checkpoint


def get_state_dict(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint, which may also be the weights themselves."""
    for key in _STATE_DICT_KEYS:
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    return checkpoint


def save_checkpoint_file(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        checkpoint: what is to be saved. A safetensors file has room for the weights, and for ``meta`` as JSON.
        path: ends in ``.pth`` (or ``.pt``, ``.bin``) or ``.safetensors``.

    Raises:
        InputError: another ending, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix == '.safetensors':
        with atomic_write(path) as temporary:
            Path(temporary).write_bytes(_safetensors(get_state_dict(checkpoint), checkpoint.get('meta', {})))
    elif path.suffix in ('.pth', '.pt', '.bin'):
        with atomic_write(path) as temporary, open(temporary, 'wb') as file:
            torch.save(checkpoint, file)  # by name it would write the name into the file, and change its hash
    else:
        raise InputError(f'{path} ends in neither .pth nor .safetensors; choose one of them.')


def _safetensors(weights: dict[str, Tensor], meta: Any) -> bytes:
    """A safetensors file; the library writes the header's metadata in random order, this one always the same bytes."""
    metadata = {'format': 'pt', 'meta': json.dumps(meta, default=_as_json)}
    content = safetensors.torch.save({key: value.contiguous() for key, value in weights.items()}, metadata)
    start = 8 + int.from_bytes(content[:8], 'little')
    header = json.dumps(json.loads(content[8:start]), sort_keys=True).encode()
    header += b' ' * (-len(header) % 8)
    return len(header).to_bytes(8, 'little') + header + content[start:]


def _as_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _load_safetensors(path: Path, map_location: Any) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = json.loads((file.metadata() or {}).get('meta', '{}'))
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f'{path} is incomplete or damaged ({first_line(error)}); copy or download it again.'
        ) from error
    if isinstance(map_location, (str, torch.device)):
        weights = {key: value.to(map_location) for key, value in weights.items()}
    return {'state_dict': weights, 'meta': meta}


def _safe_globals() -> list:
    """What may stand in a checkpoint besides tensors: types that hold values and do nothing when built."""
    from mmengine.logging import HistoryBuffer

    # numpy 1 and 2 write the same functions under different names.
    functions = [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
    allowed = [(each, f'numpy.{core}.multiarray.{each.__name__}') for each in functions for core in ('core', '_core')]
    allowed += {type(np.dtype(kind)) for kind in '?bhilqBHILQefdFDSU'}  # not objects, whose state is a pickle's again
    return [*allowed, np.ndarray, np.dtype, HistoryBuffer, argparse.Namespace, (_history_method, 'builtins.getattr')]


def _history_method(owner: type, name: str):
    """Stands in for ``getattr``, by which a HistoryBuffer names its own statistics."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL builtins.getattr({owner}, {name!r}) was not allowed')
    return getattr(owner, name)


def _refusal(path: Path, error: Exception) -> str:
    named = re.search(r'GLOBAL (.+?)(?: was not| whose module)', str(error))
    name = named[1] if named else ', '.join(_globals_of_plain_pickle(path))
    if not name:
        return f'{path} cannot be read safely ({first_line(error)}); give a checkpoint of torch.save or safetensors.'
    return (
        f'{path} is refused: reading it would call {name}, which is code and not weights; '
        'say allow_pickle (--allow-pickle) only if you would also run this file as a script.'
    )


def _globals_of_plain_pickle(path: Path) -> list[str]:
    """What a file of ``pickle.dump`` calls; torch names it only for files of ``torch.save``."""
    names, strings = [], []
    with path.open('rb') as file, suppress(ValueError):
        for opcode, value, _ in pickletools.genops(file):
            if opcode.name == 'GLOBAL':
                names.append(value.replace(' ', '.'))
            elif opcode.name == 'STACK_GLOBAL':
                names.append('.'.join(strings[-2:]))
            elif isinstance(value, str):
                strings.append(value)
    return names
