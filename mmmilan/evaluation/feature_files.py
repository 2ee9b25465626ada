"""Files of features, .npz and Parquet: written batch by batch, whole or not at all, and read with care."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mmmilan.errors import InputError
from mmmilan.evaluation.features import Arrays, fingerprint, join
from mmmilan.files import atomic_write, check_output, extension, first_line

if TYPE_CHECKING:  # an optional package
    import pyarrow

GROUP_BYTES = 1 << 25  # of rows that are written to Parquet at once
# Kind of numpy's dtypes and number of dimensions of the columns that are read.
COLUMNS = {
    'paths': ('U', 1),
    'model': ('U', 1),
    'ok': ('b', 1),
    'class_token': ('f', 2),
    'patch_tokens': ('f', 3),
    'embedding': ('f', 2),
}


def is_features(images: str | os.PathLike | Sequence[str | os.PathLike]) -> bool:
    """Whether this is a file of features and not of images."""
    return isinstance(images, (str, os.PathLike)) and extension(images) in ('.npz', '.parquet')


def read_features(path: str | os.PathLike, columns: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    """Paths of the images in a file of ``mmmilan.embed`` that could be read, and the columns [M, ...] of the file.

    Images with a value that is not finite are left out too.

    Raises:
        InputError: there is no such file, it is damaged, lacks a column, or has columns of another kind.
    """
    if not os.path.isfile(path):
        raise InputError(f'{path} is not a file; write it with mmmilan embed.')
    try:
        found, names = read_columns(path, ('paths', 'ok', *columns))
    except Exception as error:  # a damaged file can raise anything
        raise InputError(
            f'{path} is damaged, or no file of features ({first_line(error)}); write it with mmmilan embed.'
        ) from error
    missing = [name for name in ('paths', *columns) if name not in found]
    if missing:
        raise InputError(
            f'{path} has no {missing[0]} (it has {names}); write it with mmmilan embed, from a checkpoint with its '
            'decoder, and for heat maps with patches.'
        )
    found.setdefault('ok', np.ones(found['paths'].shape, bool))
    kinds = {name: COLUMNS[name] for name in found}
    odd = [name for name, (kind, ndim) in kinds.items() if found[name].dtype.kind != kind or found[name].ndim != ndim]
    odd += [name for name in found if not odd and len(found[name]) != len(found['paths'])]
    if odd:
        rows = found[odd[0]]
        raise InputError(
            f'The column {odd[0]} of {path} is {rows.dtype} {list(rows.shape)}, which mmmilan embed did not write; '
            'write the file again.'
        )
    ok = found['ok'].copy()
    for name in columns:
        ok &= np.isfinite(found[name]).all(tuple(range(1, found[name].ndim))) if found[name].dtype.kind == 'f' else True
    return found['paths'][ok].tolist(), [found[name][ok].astype(np.float32) for name in columns]


def check_written_by(path: str | os.PathLike, encoder: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Raise an :class:`InputError` if the features in a file are of another encoder, where the file says of which."""
    found = read_columns(path, ['model'])[0].get('model')
    if found is not None and len(found) and str(found[0]) != fingerprint(encoder):
        raise InputError(f'{path} has features of another model than {checkpoint}; give the checkpoint that wrote it.')


def read_columns(path: str | os.PathLike, columns: Sequence[str]) -> tuple[dict[str, np.ndarray], str]:
    """Those of some columns that a file has, and the names of all its columns."""
    if extension(path) == '.parquet':
        return read_parquet(path, columns)
    if not zipfile.is_zipfile(path):  # of which NumPy would say how to load it unsafely
        raise ValueError('it is no .npz')
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in columns if name in file.files}, ', '.join(file.files)


def read_parquet(path: str | os.PathLike, columns: Sequence[str]) -> tuple[dict[str, np.ndarray], str]:
    """As :func:`read_columns`; rows of patch tokens, which the file holds flat, get the width of the class token."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    names, found = file.schema_arrow.names, {}
    for name in columns:
        if name in names:
            rows = file.read([name])[name].to_pylist()
            if name == 'paths':
                rows = [row if isinstance(row, str) else os.fsdecode(row) for row in rows]
            found[name] = np.array(rows)
    if 'patch_tokens' in found and 'class_token' in found:
        found['patch_tokens'] = found['patch_tokens'].reshape(len(found['paths']), -1, found['class_token'].shape[1])
    return found, ', '.join(names)


def read_embeddings(path: str | os.PathLike) -> tuple[list[str], Tensor]:
    """Paths and embeddings [M, C] of length 1 in a file of ``mmmilan.embed``.

    Raises:
        InputError: there is no such file, or it has no embeddings.
    """
    paths, [embeddings] = read_features(path, ['embedding'])
    return paths, torch.nn.functional.normalize(torch.from_numpy(embeddings), dim=1)


def check_features_output(out: str | os.PathLike, inputs: Sequence[str | os.PathLike], overwrite: bool) -> None:
    """Refuse a path that :func:`write_features` could not or must not write, before the features are computed.

    Raises:
        InputError: the file is neither ``.npz`` nor ``.parquet``, pyarrow is missing, or as
            :func:`mmmilan.files.check_output` says.
    """
    path = check_output(out, inputs, endings=('.npz', '.parquet'), overwrite=overwrite)
    if extension(path) == '.parquet':
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise InputError(f'{path} needs pyarrow; pip install pyarrow, or write .npz.') from error


def write_features(path: Path, number: int, batches: Iterator[Arrays], as_bytes: bool = False) -> None:
    """Write batches of columns as ``.npz`` or as Parquet (each row a flat list), whole or not at all, as they come.

    Args:
        path: The file.
        number: How many rows there are in all.
        batches: Columns [B, ...] by name, of the same types in every batch.
        as_bytes: Write ``paths`` to Parquet as bytes, as the system has them.
    """
    first = next(batches)  # what is wrong with the model or the images is not a fault of the file
    batches = itertools.chain([first], batches)
    with atomic_write(path) as temporary:
        if extension(path) == '.npz':
            write_columns(temporary, number, batches)
        else:
            write_groups(temporary, row_groups(batches, as_bytes))


def write_columns(path: str, number: int, batches: Iterator[Arrays]) -> None:
    """Write batches of columns as ``.npz`` through one temporary file a column, without a name, beside it."""
    with ExitStack() as stack, zipfile.ZipFile(path, 'w') as archive:
        columns: dict[str, IO[bytes]] = {}
        for batch in batches:
            for name, rows in batch.items():
                if name not in columns:
                    columns[name] = stack.enter_context(tempfile.TemporaryFile(dir=os.path.dirname(path)))
                    header = dict(descr=rows.dtype.str, fortran_order=False, shape=(number, *rows.shape[1:]))
                    np.lib.format.write_array_header_1_0(columns[name], header)
                columns[name].write(np.ascontiguousarray(rows).tobytes())
        for name, column in columns.items():
            column.seek(0)
            with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
                shutil.copyfileobj(column, member, 1 << 20)


def write_groups(path: str, groups: Iterator[pyarrow.Table]) -> None:
    """Write tables as the groups of rows of a Parquet file."""
    import pyarrow.parquet

    first = next(groups)
    with pyarrow.parquet.ParquetWriter(path, first.schema) as writer:
        for table in itertools.chain([first], groups):
            writer.write_table(table)


def row_groups(batches: Iterable[Arrays], as_bytes: bool) -> Iterator[pyarrow.Table]:
    """Batches of columns as tables of at least ``GROUP_BYTES``, except for the last one; see :func:`write_features`."""
    import pyarrow

    def column(name: str, rows: np.ndarray) -> pyarrow.Array:
        if name == 'paths' and as_bytes:
            return pyarrow.array(list(map(os.fsencode, rows.tolist())))
        return pyarrow.array(list(rows.reshape(len(rows), -1)) if rows.ndim > 1 else rows)

    def table() -> pyarrow.Table:
        return pyarrow.table({name: column(name, rows) for name, rows in join(waiting).items()})

    waiting, size = [], 0
    for batch in batches:
        waiting.append(batch)
        size += sum(rows.nbytes for rows in batch.values())
        if size >= GROUP_BYTES:
            yield table()
            waiting, size = [], 0
    if waiting:
        yield table()


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as ``.npz``, whole or not at all."""
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)
