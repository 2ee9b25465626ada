"""Read checkpoint files as data, never as code.

Every file of weights is read by :func:`load_checkpoint_file`. A ``.pth`` file is a pickle, which can call any function
while it is read; :mod:`mmmilan.checkpoints.unpickling` reads it as data and refuses anything else. MMEngine itself
falls back to the full pickle; :func:`mmmilan.checkpoints.loading.use_safe_loading` prevents that.
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

from mmmilan.checkpoints.archives import check_archive, read_archive, read_meta
from mmmilan.checkpoints.layouts import find_models, outermost, several_models
from mmmilan.checkpoints.unpickling import ForbiddenName
from mmmilan.errors import InputError, count, warn
from mmmilan.files import atomic_write, extension, first_line

# Where a checkpoint keeps its weights: MMEngine, MAE and the published repository, others.
_STATE_DICT_KEYS = ('state_dict', 'model', 'module', 'model_state_dict')
# The weights in a folder of Hugging Face's ``save_pretrained``.
_SAVE_PRETRAINED = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)
_CHECKSUM = 'crc32'  # of a safetensors file's numbers, in its metadata; the format itself has none
STOPPED = 'stopped_iter_'  # prefix of the checkpoint of a run that was told to stop
# Weights that are integers.
_COUNTS = re.compile(r'num_batches_tracked$|relative_position_index$|position_ids$')


def load_checkpoint_file(
    path: str | os.PathLike, allow_pickle: bool = False, map_location: Any = 'cpu'
) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: a file of ``torch.save``, a TorchScript archive (only its tensors are read) or a safetensors file; the
            format is detected by content. Or a folder of ``save_pretrained``. ``PATH#NAME`` is one of several models
            in it, such as ``dino.pth#teacher``.
        allow_pickle: read a pickle that the safe reader refuses. It can run any code: only for files that you would
            also run as a script.
        map_location: the device of the tensors.

    Returns:
        The content of the file; for a safetensors file ``{'state_dict': ..., 'meta': ...}``. ``meta['config']`` is
        removed, as MMEngine would execute it.

    Raises:
        InputError: the file is missing, incomplete, damaged (checksums are compared), of another format, or would
            run code.
    """
    path, model = split_name(path)
    try:
        if weights_of_folder(path):
            checkpoint = _read_folder(path, allow_pickle)
        elif path.is_file():
            checkpoint = _read(path, allow_pickle)
        else:
            raise InputError(f'{path} is not a file; give the path of a checkpoint.')
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f'{path} is incomplete or damaged ({first_line(error)}); copy or download it again.'
        ) from error
    if not isinstance(checkpoint, dict):
        raise InputError(
            f'{path} holds a {type(checkpoint).__name__} and not a dictionary of weights; give a checkpoint.'
        )
    if isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)
    elif not isinstance(checkpoint.get('meta'), Tensor):
        checkpoint.pop('meta', None)  # of another program
    if model:
        checkpoint = {'state_dict': choose_model(checkpoint, model, str(path)), 'meta': checkpoint.get('meta', {})}
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


def split_name(path: str | os.PathLike) -> tuple[Path, str]:
    """The path of a checkpoint and, after a #, the name of a model in it; '' if none is given."""
    whole = Path(path).expanduser()
    file, separator, name = str(whole).rpartition('#')
    return (whole, '') if whole.exists() or not separator else (Path(file), name)


def weights_of_folder(folder: Path) -> Path | None:
    """The file of weights, or their index, in a folder of ``save_pretrained``; None if it is no such folder."""
    return next((folder / name for name in _SAVE_PRETRAINED if (folder / name).is_file()), None)


def _read_folder(folder: Path, allow_pickle: bool) -> Any:
    file = weights_of_folder(folder)
    if file.suffix != '.json':
        return _read(file, allow_pickle)
    shards = sorted(set(json.loads(file.read_text(encoding='utf-8'))['weight_map'].values()))
    if any(Path(shard).name != shard for shard in shards):
        raise InputError(f'{file} names files of other folders; give a folder with all of its files.')
    weights = {}
    for shard in shards:
        weights |= get_state_dict(_read(folder / shard, allow_pickle), str(folder / shard))
    return {'state_dict': weights, 'meta': {}}


def get_state_dict(checkpoint: dict[str, Any], source: str = 'The checkpoint') -> dict[str, Tensor]:
    """The state dict in a checkpoint, or the checkpoint itself if it is a state dict; messages call it ``source``.

    The one that holds a ViT is meant, wherever it stands; MMEngine's is always ``state_dict``.

    Raises:
        InputError: an entry is not a tensor with a name, or several state dicts hold a ViT.
    """
    with_vit = {name: each for name, each in _state_dicts(checkpoint).items() if find_models(each)}
    found = [checkpoint[key] for key in _STATE_DICT_KEYS if isinstance(checkpoint.get(key), dict)]
    if len(with_vit) > 1 and 'message_hub' not in checkpoint:
        raise several_models(with_vit, source)
    if len(with_vit) == 1:
        found = list(with_vit.values())
    weights = found[0] if found else checkpoint
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(
                f'{source}: {key!r} is a {type(value).__name__}, not a tensor; give the state dict itself.'
            )
    return weights


def _state_dicts(content: dict, name: str = '', levels: int = 3) -> dict[str, dict[str, Any]]:
    """All dictionaries in a checkpoint that hold tensors by name, by their place in it, such as 'model.teacher.'."""
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    found = {name: named} if any(isinstance(value, Tensor) for value in named.values()) else {}
    for key, value in named.items():
        if isinstance(value, dict) and levels:
            found |= _state_dicts(value, f'{name}{key}.', levels - 1)
    return found


def choose_model(checkpoint: dict[str, Any], name: str, source: str) -> dict[str, Tensor]:
    """The weights of one of several models in a checkpoint, whose place in it holds this name.

    Raises:
        InputError: it holds no such model, or several.
    """
    places = _state_dicts(checkpoint)
    weights = {f'{place}{key}': value for place, each in places.items() for key, value in each.items()}
    models = find_models(weights) + [place for place, each in places.items() if not find_models(each)]
    chosen = outermost([each for each in models if f'.{name}.' in f'.{each}'])
    if len(chosen) != 1:
        names = ', '.join(sorted(each.rstrip('.') for each in chosen or models)) or 'no named one'
        raise InputError(f'{source} holds {"several" if chosen else "no"} models {name!r}; choose one of: {names}.')
    return {key.removeprefix(chosen[0]): value for key, value in weights.items() if key.startswith(chosen[0])}


def get_dataset_meta(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint knows of the data set that it was trained on, such as its ``classes``; {} if nothing."""
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    found = meta.get('dataset_meta') or ({'classes': meta['CLASSES']} if 'CLASSES' in meta else {})
    classes = found.get('classes') if isinstance(found, dict) else None
    if isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
        return found
    return {key: value for key, value in found.items() if key != 'classes'} if isinstance(found, dict) else {}


def check_values(weights: dict[str, Tensor], source: str, model: dict[str, Tensor] | None = None) -> None:
    """Refuse weights that are not finite or not floating-point.

    Args:
        weights: Weights by name.
        source: Name of their file in messages.
        model: State dict of the model. Weights that are integers or booleans in it are not checked; without it, only
            those of ``_COUNTS`` are not checked.

    Raises:
        InputError: a weight is not finite, or not floating-point.
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
    """Write a checkpoint atomically.

    Args:
        checkpoint: the checkpoint. A safetensors file stores only its weights, and ``meta`` as JSON.
        path: file name that ends in ``.pth`` (or ``.pt``, ``.bin``) or ``.safetensors``.

    Raises:
        InputError: the file name ends otherwise, or the file cannot be written.
    """
    path = Path(path)
    if extension(path) == '.safetensors':
        with atomic_write(path) as temporary:
            Path(temporary).write_bytes(_safetensors(get_state_dict(checkpoint), checkpoint.get('meta', {})))
    elif extension(path) in ('.pth', '.pt', '.bin'):
        with atomic_write(path) as temporary, open(temporary, 'wb') as file:
            torch.save(checkpoint, file)  # given a path, it would store the file name and change the hash
    else:
        raise InputError(f'{path} ends in neither .pth nor .safetensors; choose one of them.')


def _safetensors(weights: dict[str, Tensor], meta: Any) -> bytes:
    """The bytes of a safetensors file; deterministic, while the library orders the header's metadata at random."""
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
    with safetensors.safe_open(path, framework='pt') as file:  # compares all sizes with the file size
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != f'{_checksum(path):08x}':
        raise ValueError('its checksum is wrong')
    try:
        meta = json.loads(metadata.get('meta', '{}'))
    except (ValueError, RecursionError):  # another program's metadata
        meta = {}
    return {'state_dict': weights, 'meta': meta if isinstance(meta, dict) else {}}


def _checksum(path: Path) -> int:
    """Checksum of the tensor data of a safetensors file, which follow the header."""
    checksum = 0
    with path.open('rb') as file:
        file.seek(int.from_bytes(file.read(8), 'little'), os.SEEK_CUR)
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder that a run can resume, by MMEngine's file names and ``STOPPED``."""
    return sorted(path for kind in ('epoch', 'iter', STOPPED[:-1]) for path in folder.glob(f'{kind}_[0-9]*.pth'))


def find_newest(folder: Path) -> Path | None:
    """The complete checkpoint of the latest iteration; None if the folder has no checkpoints.

    The files decide, not ``last_checkpoint``, so the folder can be copied or moved. Damaged files are skipped with a
    warning.

    Raises:
        InputError: there are checkpoints, but none is complete.
    """
    found: list[tuple[int, Path]] = []
    paths = checkpoints_in(folder)
    for path in paths:
        try:
            found.append((int(read_meta(path)['iter']), path))
        except Exception as error:  # of any type, as the file may hold anything
            _say_skipped(path, error)
    for _, path in sorted(found, reverse=True):
        try:
            check_archive(path)
            return path
        except Exception as error:
            _say_skipped(path, error)
    if paths:
        raise InputError(
            f'Of {count(len(paths), "checkpoint")} in {folder} none is complete; copy one there, or start anew in '
            'another --work-dir.'
        )
    return None


def _say_skipped(path: Path, error: Exception) -> None:
    warn(f'{path} is skipped: {first_line(error)}.')
