"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmmilan.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[str]:
    """Yield a temporary file name beside ``path``; it is renamed to ``path`` unless an exception is raised.

    The file is on the disk before it is renamed, so that a crash of the machine leaves the old file or the new one.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
        os.close(handle)
    except OSError as error:
        raise InputError(f'{path} cannot be written ({error.strerror}); choose another folder.') from error
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets only the owner read it
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        raise InputError(
            f'{path} was not written ({first_line(error)}); free space or choose another folder.'
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, before anything is deleted; not every file system supports it."""
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        Path(temporary).write_text(text, encoding='utf-8')


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the exception's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
