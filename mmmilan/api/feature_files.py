"""Files of features, as ``mmmilan.embed`` writes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from torch import Tensor


def is_features(images: str | os.PathLike | Sequence[str | os.PathLike]) -> bool:
    """Whether this is a file of features and not of images."""
    return isinstance(images, (str, os.PathLike)) and Path(images).suffix == '.npz'


def read_features(path: str | os.PathLike, columns: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    """Paths of the images in a file of ``mmmilan.embed`` that could be read, and the columns [M, ...] of the file.

    Raises:
        InputError: there is no such file, or it lacks a column.
    """
    import numpy as np

    if not os.path.isfile(path):
        raise InputError(f'{path} is not a file; write it with mmmilan embed.')
    with np.load(path, allow_pickle=False) as file:
        missing = [name for name in ('paths', *columns) if name not in file.files]
        if missing:
            raise InputError(
                f'{path} has no {missing[0]} (it has {", ".join(file.files)}); write it with mmmilan embed, from a '
                'checkpoint with its decoder, and for heat maps with patches.'
            )
        ok = file['ok'] if 'ok' in file.files else np.ones(len(file['paths']), bool)
        return file['paths'][ok].tolist(), [file[name][ok].astype(np.float32) for name in columns]


def read_embeddings(path: str | os.PathLike) -> tuple[list[str], Tensor]:
    """Paths and embeddings [M, C] of length 1 in a file of ``mmmilan.embed``.

    Raises:
        InputError: there is no such file, or it has no embeddings.
    """
    import torch

    paths, [embeddings] = read_features(path, ['embedding'])
    return paths, torch.nn.functional.normalize(torch.from_numpy(embeddings), dim=1)


def check_extension(path: Path) -> None:
    """Refuse a path that :func:`write_features` could not write, before the features are computed.

    Raises:
        InputError: the file is neither ``.npz`` nor ``.parquet``, or pyarrow is missing.
    """
    if path.suffix not in ('.npz', '.parquet'):
        raise InputError(f'{path} ends in neither .npz nor .parquet; choose one of them.')
    if path.suffix == '.parquet':
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise InputError(f'{path} needs pyarrow; pip install pyarrow, or write .npz.') from error


def write_features(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write columns of equal length as ``.npz`` or as Parquet (each row a flat list), whole or not at all."""
    from mmmilan.files import atomic_write

    if path.suffix == '.npz':
        write_npz(path, **columns)
        return
    import pyarrow as pa
    import pyarrow.parquet

    arrays = {
        name: pa.array(list(rows.reshape(len(rows), -1)) if rows.ndim > 1 else rows) for name, rows in columns.items()
    }
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        pyarrow.parquet.write_table(pa.table(arrays), file)


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    """Write arrays as ``.npz``, whole or not at all; returns the path."""
    import numpy as np

    from mmmilan.files import atomic_write

    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)
    return path
