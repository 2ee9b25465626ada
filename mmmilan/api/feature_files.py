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
    """Paths and columns of a file of ``mmmilan.embed``, of the images that could be read.

    Raises:
        InputError: there is no such file, or a column is not in it.
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
    """Paths and embeddings [M, C] of length 1 of a file of ``mmmilan.embed``."""
    import torch

    paths, [embeddings] = read_features(path, ['embedding'])
    return paths, torch.nn.functional.normalize(torch.from_numpy(embeddings), dim=1)


def write_npz(path: Path, **columns: np.ndarray) -> Path:
    """Write arrays, whole or not at all."""
    import numpy as np

    from mmmilan.files import atomic_write

    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **columns)
    return path
