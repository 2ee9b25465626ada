"""Checkpoint files, read as data and never as code.

Every file of weights comes in through :func:`load_checkpoint_file`. A ``.pth`` file is a pickle, which can call any
function while it is read; :mod:`mmmilan.checkpoints.unpickling` reads it as data and refuses the rest by name. MMEngine
itself falls back to the full pickle: ``use_safe_loading`` ends that.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmmilan.checkpoints.archives import read_archive
from mmmilan.checkpoints.unpickling import ForbiddenName
from mmmilan.errors import InputError
from mmmilan.files import atomic_write, first_line

# Where a checkpoint keeps its weights: MMEngine, MAE and the published repository, others.
_STATE_DICT_KEYS = ('state_dict', 'model', 'module', 'model_state_dict')
_CHECKSUM = 'crc32'  # of a safetensors file's numbers, in its metadata; the format itself has none
# Weights that are whole numbers.
_COUNTS = re.compile(r'num_batches_tracked$|relative_position_index$|position_ids$')


def load_checkpoint_file(
    path: str | os.PathLike, allow_pickle: bool = False, map_location: Any = 'cpu'
) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: a file of ``torch.save``, a TorchScript archive (of which it takes the tensors and no code) or a
            safetensors file; which of them is told by its content.
        allow_pickle: read a pickle that the safe reader refuses. It can then run any code: only for files that you
            would also run as a script.
        map_location: the device of the tensors.

    Returns:
        What was saved; for a safetensors file ``{'state_dict': ..., 'meta': ...}``. ``meta['config']``, which MMEngine
        would run, is left out.

    Raises:
        InputError: the file is missing, incomplete, damaged (its checksums are compared), of another kind, or would
            run code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f'{path} is not a file; give the path of a checkpoint.')
    try:
        checkpoint = _read(path, allow_pickle)
    except InputError:
        raise
    except Exception as error:  # what a damaged file raises can be of any type
        raise InputError(
            f'{path} is incomplete or damaged ({first_line(error)}); copy or download it again.'
        ) from error
    if not isinstance(checkpoint, dict):
        raise InputError(
            f'{path} holds a {type(checkpoint).__name__} in place of a dictionary of weights; give a checkpoint.'
        )
    if isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)
    if isinstance(map_location, (str, torch.device)) and torch.device(map_location).type != 'cpu':
        checkpoint = tree_map_only(Tensor, lambda tensor: tensor.to(map_location), checkpoint)
    return checkpoint


def _read(path: Path, allow_pickle: bool) -> Any:
    with path.open('rb') as file:
        start = file.read(9)
    if start[8:] == b'{':  # eight bytes of length, then a JSON header
        return _load_safetensors(path)
    if not start.startswith((b'PK\x03\x04', b'\x80')):
        raise InputError(
            f'{path} is neither a PyTorch nor a safetensors file (it begins with {start[:8]!r}); give a checkpoint.'
        )
    try:
        return read_archive(path)
    except ForbiddenName as error:
        if not allow_pickle:
            raise InputError(
                f'{path} is refused: reading it would call {first_line(error)}, which is code and not weights; '
                'say allow_pickle (--allow-pickle) only if you would also run this file as a script.'
            ) from None
        return torch.load(path, map_location='cpu', weights_only=False)


def get_state_dict(checkpoint: dict[str, Any], source: str = 'The checkpoint') -> dict[str, Tensor]:
    """The weights in a checkpoint, which may also be the weights themselves; messages call it ``source``.

    Raises:
        InputError: they are not tensors with names.
    """
    found = [checkpoint[key] for key in _STATE_DICT_KEYS if isinstance(checkpoint.get(key), dict)]
    weights = found[0] if found else checkpoint
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(
                f'{source}: {key!r} is a {type(value).__name__}, not a tensor; give the state dict itself.'
            )
    return weights


def check_values(weights: dict[str, Tensor], source: str, model: dict[str, Tensor] | None = None) -> None:
    """Refuse weights that training never gives.

    Args:
        weights: Weights by name.
        source: What messages call their file.
        model: The state dict that they are for, which tells what is a whole number or a boolean; without it, only what
            batch normalisation counts.

    Raises:
        InputError: one is not finite, or not a real number where the model has one.
    """
    for key, value in weights.items():
        counts = not model[key].is_floating_point() if model and key in model else bool(_COUNTS.search(key))
        if counts and not value.is_complex():
            continue
        if not value.is_floating_point():
            raise InputError(f'{source}: {key} is {value.dtype}, where weights are real numbers; give another file.')
        if not value.float().isfinite().all():
            raise InputError(f'{source}: {key} is not finite (NaN or infinite); give an earlier or another checkpoint.')


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
    tensors = {key: value.contiguous() for key, value in weights.items()}
    content = safetensors.torch.save(tensors, {'format': 'pt', 'meta': json.dumps(meta, default=_as_json)})
    start = 8 + int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:start])
    header['__metadata__'] |= {_CHECKSUM: f'{zlib.crc32(memoryview(content)[start:]):08x}'}
    header = json.dumps(header, sort_keys=True).encode()
    header += b' ' * (-len(header) % 8)
    return len(header).to_bytes(8, 'little') + header + content[start:]


def _as_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework='pt') as file:  # compares all sizes with the file's
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != f'{_checksum(path):08x}':
        raise ValueError('its checksum is wrong')
    try:
        meta = json.loads(metadata.get('meta', '{}'))
    except (ValueError, RecursionError):  # another program's
        meta = {}
    return {'state_dict': weights, 'meta': meta if isinstance(meta, dict) else {}}


def _checksum(path: Path) -> int:
    """That of the numbers of a safetensors file, which follow its header."""
    checksum = 0
    with path.open('rb') as file:
        file.seek(int.from_bytes(file.read(8), 'little'), os.SEEK_CUR)
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
