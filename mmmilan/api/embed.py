"""Write the features of many images to a file, and read such files."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mmmilan import arguments
from mmmilan.arguments import checked
from mmmilan.errors import InputError
from mmmilan.files import extension, first_line

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    import pyarrow
    from torch import Tensor, nn

    from mmmilan.evaluation.features import Arrays


@checked
def embed(
    images: arguments.Paths,
    checkpoint: arguments.Path,
    out: arguments.Path,
    *,
    patches: bool = False,
    batch_size: arguments.Count = 32,
    num_workers: arguments.Workers | None = None,
    device: arguments.Device | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the features of images to a file.

    The columns of the file, with one row per image in the order given, are ``paths``; ``ok`` (whether the image could
    be read); ``model``, 16 digits that tell the encoder from others; ``class_token`` and ``mean_token`` [M, D]; and, if
    the checkpoint compares images with texts (MILAN with its decoder, MaskCLIP), ``embedding`` [M, C], of length 1 in
    their space. Features are float32; those of an image that cannot be used are NaN. The file is written batch by
    batch. In Parquet, whose texts are UTF-8, ``paths`` are bytes if a name is not. Under ``python -m mmmilan.torchrun``
    each process takes a part of the images.

    Args:
        images: images, folders of images (flat or nested, sorted by path) and tar shards.
        checkpoint: a model of the zoo, or a checkpoint of your own.
        out: file to write, .npz or .parquet (which needs pyarrow).
        patches: also write ``patch_tokens`` [M, N, D], float16: 0.3 MB per image for a ViT-B/16.
        batch_size: number of images that the model sees at once.
        num_workers: number of processes that read images, by default one per core and at most 8.
        device: where to run, by default on the GPU if there is one.
        overwrite: replace the file if there is one.

    Returns:
        The path of the file.

    Raises:
        InputError: an image is missing, none can be read, the checkpoint is that of a detector or segmentor, or the
            file must not or cannot be written.

    Examples:
        >>> mmmilan.embed('photos', 'runs/photos/milan.pth', 'photos.npz')
        >>> numpy.load('photos.npz')['class_token'].shape
        (3068, 768)
    """
    import numpy as np
    from mmengine.dist import is_main_process

    from mmmilan.api.inference import Inferencer
    from mmmilan.api.models import build_embedder
    from mmmilan.datasets.image_folder import as_sources, list_images
    from mmmilan.engine.distributed import joined, on_main
    from mmmilan.evaluation.features import fingerprint

    with joined():
        on_main(lambda: check_features_output(out, [checkpoint, *as_sources(images)], overwrite))
        path, files = Path(out), list_images(images)
        reader = Inferencer(checkpoint, device=device)
        embedder = build_embedder(reader.model, checkpoint)

        def encode(inputs: Tensor) -> dict[str, Tensor]:
            features = embedder(inputs)
            return {name: rows for name, rows in features.items() if patches or name != 'patch_tokens'}

        model = fingerprint(embedder.backbone)
        batches = reader.extract(files, encode, 'Features', batch_size=batch_size, num_workers=num_workers)
        columns = (rows | dict(model=np.full(len(rows['ok']), model)) for rows in add_rows(files, batches))
        if is_main_process():
            write_features(path, len(files), columns, as_bytes=not is_utf8(files))
        else:
            deque(columns, maxlen=0)
    return path


def is_utf8(names: Iterable[str]) -> bool:
    """Whether all names of files are UTF-8, as text in Parquet must be."""
    try:
        return all(name.encode() for name in names)
    except UnicodeEncodeError:
        return False


def add_rows(files: Sequence[str], batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """The columns of each batch, with rows of NaN for the files that were left out."""
    import numpy as np

    begin, width = 0, max(map(len, files))

    def columns(end: int, found: np.ndarray, batch: Arrays) -> Arrays:
        ok = np.isin(np.arange(begin, end), found)
        rows = dict(paths=np.array(files[begin:end], f'U{width}'), ok=ok)
        for name, values in batch.items():
            dtype = np.float16 if name == 'patch_tokens' else np.float32
            rows[name] = np.full((len(ok), *values.shape[1:]), np.nan, dtype)
            rows[name][ok] = values
        return rows

    for batch in batches:
        found = batch.pop('position')
        yield columns(found[-1] + 1, found, batch)
        begin = found[-1] + 1
    if begin < len(files):
        yield columns(len(files), found[:0], {name: values[:0] for name, values in batch.items()})


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
    import numpy as np

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
    from mmmilan.evaluation.features import fingerprint

    found = read_columns(path, ['model'])[0].get('model')
    if found is not None and len(found) and str(found[0]) != fingerprint(encoder):
        raise InputError(f'{path} has features of another model than {checkpoint}; give the checkpoint that wrote it.')


def read_columns(path: str | os.PathLike, columns: Sequence[str]) -> tuple[dict[str, np.ndarray], str]:
    """Those of some columns that a file has, and the names of all its columns."""
    import numpy as np

    if extension(path) == '.parquet':
        return read_parquet(path, columns)
    if not zipfile.is_zipfile(path):  # of which NumPy would say how to load it unsafely
        raise ValueError('it is no .npz')
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in columns if name in file.files}, ', '.join(file.files)


def read_parquet(path: str | os.PathLike, columns: Sequence[str]) -> tuple[dict[str, np.ndarray], str]:
    """As :func:`read_columns`; rows of patch tokens, which the file holds flat, get the width of the class token."""
    import numpy as np
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
    import torch

    paths, [embeddings] = read_features(path, ['embedding'])
    return paths, torch.nn.functional.normalize(torch.from_numpy(embeddings), dim=1)


def check_features_output(out: str | os.PathLike, inputs: Sequence[str | os.PathLike], overwrite: bool) -> None:
    """Refuse a path that :func:`write_features` could not or must not write, before the features are computed.

    Raises:
        InputError: the file is neither ``.npz`` nor ``.parquet``, pyarrow is missing, or as
            :func:`mmmilan.files.check_output` says.
    """
    from mmmilan.files import check_output

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
    from mmmilan.files import atomic_write

    first = next(batches)  # what is wrong with the model or the images is not a fault of the file
    batches = itertools.chain([first], batches)
    with atomic_write(path) as temporary:
        if extension(path) == '.npz':
            write_columns(temporary, number, batches)
        else:
            write_groups(temporary, row_groups(batches, as_bytes))


def write_columns(path: str, number: int, batches: Iterator[Arrays]) -> None:
    """Write batches of columns as ``.npz`` through one temporary file a column, without a name, beside it."""
    import numpy as np

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

    from mmmilan.evaluation.features import join

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
    import numpy as np

    from mmmilan.files import atomic_write

    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)
