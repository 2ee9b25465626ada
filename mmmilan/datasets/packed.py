"""Pack a folder of images into one LMDB, for disks and networks on which millions of small files are slow.

MMEngine's LMDB backend reads it: ``backend_args=dict(backend='lmdb', db_path=...)``. The keys are the paths of the
images relative to the folder, the values their files, unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from mmmilan.errors import InputError
from mmmilan.files import atomic_folder, check_output_folder

COMMIT_EVERY = 10000


def import_lmdb() -> ModuleType:
    """Import the optional package lmdb.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise InputError('Images in an LMDB need the package lmdb; run `pip install lmdb`.') from error
    return lmdb


def list_lmdb(db_path: str) -> list[str]:
    """The keys of a database, sorted.

    Raises:
        InputError: there is no such database, it cannot be read, or the package lmdb is missing.
    """
    lmdb = import_lmdb()
    if not os.path.isdir(db_path):
        raise InputError(f'The database {db_path} does not exist; make it with tools/pack_images.py.')
    try:
        with lmdb.open(db_path, readonly=True, lock=False) as database:
            # reading past the end of a memory-mapped file would kill the process without a message
            needed = (database.info()['last_pgno'] + 1) * database.stat()['psize']
            if os.path.getsize(os.path.join(db_path, 'data.mdb')) < needed:
                raise InputError(f'The database {db_path} is incomplete; copy it again, or make it again.')
            with database.begin() as transaction, transaction.cursor() as cursor:
                return [key.decode() for key in cursor.iternext(values=False)]
    except (lmdb.Error, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'The database {db_path} cannot be read ({error}); copy it again, or make it again.'
        ) from error


def pack_images(folder: Path, paths: Iterable[Path], db_path: Path) -> None:
    """Write the images at ``paths``, all below ``folder``, into a new database, whole or not at all.

    Raises:
        InputError: the database exists or cannot be written, an image cannot be read, or a name is too long or not
            ASCII (which MMEngine's backend requires).
    """
    lmdb = import_lmdb()
    if os.path.lexists(db_path):
        raise InputError(f'{db_path} exists; remove it or choose another name.')
    check_output_folder(db_path)
    try:
        # map_size limits the size of the file; no memory is taken up
        with (
            atomic_folder(db_path) as unfinished,
            lmdb.open(str(unfinished), map_size=1 << 42) as database,
        ):
            transaction = database.begin(write=True)
            for i, path in enumerate(paths):
                transaction.put(key_of(path.relative_to(folder), database.max_key_size()), path.read_bytes())
                if i % COMMIT_EVERY == COMMIT_EVERY - 1:
                    transaction.commit()
                    transaction = database.begin(write=True)
            transaction.commit()
    except lmdb.Error as error:
        raise InputError(f'{db_path} was not written ({error}); free space or choose another folder.') from error


def key_of(path: Path, longest: int) -> bytes:
    """The key of an image.

    Raises:
        InputError: it is longer than ``longest`` bytes, or not ASCII.
    """
    name = path.as_posix()
    if not name.isascii() or len(name) > longest:
        raise InputError(f'The name {name} is not ASCII, or longer than {longest}; rename it.')
    return name.encode()
