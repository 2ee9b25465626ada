"""Where a command may write, decided before its work begins; files and folders written whole or not at all.

An output is never an input, never a device, and never outside the folder that was named. A file that exists is replaced
only with ``overwrite`` (``--overwrite``), or where it says itself that the same command wrote it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmmilan.errors import UNFINISHED, InputError

ENDING = '.mmmilan-tmp'  # of temporary files and folders
FULL_DISK = re.compile(r'PytorchStreamWriter|unexpected pos|write\(\)')  # in the RuntimeErrors of torch.save
LONGEST_NAME = 240  # bytes, of an image's picture before its number and ending; file systems take 255


def check_output(
    path: str | os.PathLike,
    inputs: Iterable[str | os.PathLike] = (),
    *,
    endings: Sequence[str] = (),
    overwrite: bool = False,
    mark: str | None = None,
) -> Path:
    """Decide whether a command may write a file, before it does anything else.

    Args:
        path: the file.
        inputs: the files and folders that the command reads; names of anything else are ignored.
        endings: how the name may end, such as '.html'.
        overwrite: whether the user allows a file to be replaced.
        mark: a text by which the command recognises a file that it wrote itself, and may replace.

    Returns:
        The path.

    Raises:
        InputError: the command must not write there, or cannot.
    """
    path = Path(path)
    if endings and extension(path) not in endings:
        raise InputError(f'{path} does not end in {" or ".join(endings)}; choose a name that does.')
    try:
        exists = os.lstat(path) is not None
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:
        raise InputError(f'{path} cannot be written ({_reason(error)}); choose another name.') from error
    if path.is_dir():
        raise InputError(f'{path} is a folder; give the name of a file.')
    if exists and not path.is_file() and not path.is_symlink():
        raise InputError(f'{path} is a device or a pipe; give the name of a file.')
    if exists and any(is_same(path, each) for each in inputs):
        raise InputError(f'{path} would be replaced, which is read by the same command; choose another name.')
    if exists and not overwrite and not (mark and contains(path, mark)):
        raise InputError(f'{path} exists; choose another name, or add --overwrite (overwrite=True) to replace it.')
    _check_folder(path.parent)
    return path


def check_output_folder(
    folder: str | os.PathLike,
    names: Iterable[str] = (),
    inputs: Iterable[str | os.PathLike] = (),
    *,
    overwrite: bool = False,
    pictures: bool = False,
) -> Path:
    """Decide whether a command may write files of these names into a folder, before it does anything else.

    Args:
        folder: the folder, which need not exist.
        names: of the files; with ``pictures``, none stands for any.
        inputs: as for :func:`check_output`.
        overwrite: as for :func:`check_output`.
        pictures: whether images are written, which must not lie in a folder of images that the command reads.

    Returns:
        The folder.

    Raises:
        InputError: the command must not write there, or cannot.
    """
    folder, inputs, names = Path(folder), list(inputs), list(names)
    _check_folder(folder)
    for each in inputs if pictures else ():
        inside, image = Path(os.path.realpath(folder)), Path(os.path.realpath(each))
        if not names and os.path.exists(each) and image.is_relative_to(inside):
            raise InputError(
                f'{each} is read, and lies in {folder}, where pictures are written; choose another folder.'
            )
        if os.path.isdir(each) and inside.is_relative_to(image):
            raise InputError(
                f'{folder} lies in {each}, whose images are read: the pictures would be among them; choose another '
                'folder.'
            )
    for name in names:
        check_name(name)
        check_output(folder / name, inputs, overwrite=overwrite)
    return folder


def check_name(name: str) -> str:
    """The name of a file without folders.

    Raises:
        InputError: it has a folder, or is empty.
    """
    if name in ('', '.', '..') or '/' in name or '\0' in name:
        raise InputError(f'The name {name!r} does not stay in the folder of the output; leave out / and ..')
    return name


def extension(path: str | os.PathLike) -> str:
    """The extension of a file in lower case, with its dot; '' without one."""
    name = os.fspath(path)
    return name[dot:].lower() if (dot := name.rfind('.')) > name.rfind('/') + 1 else ''


def short_name(name: str, longest: int = LONGEST_NAME) -> str:
    """A name of at most ``longest`` bytes, in whole letters; of one that is cut, a checksum is the end."""
    content = os.fsencode(name)
    if len(content) <= longest:
        return name
    end = f'-{zlib.crc32(content):08x}'
    while len(os.fsencode(name)) > longest - len(end):
        name = name[:-1]
    return name + end


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f'{folder} cannot be made ({_reason(error)}); choose another folder.') from error


def _check_folder(folder: Path) -> None:
    """Check that files can be written in a folder, or in the nearest one above it that exists."""
    above = folder
    try:
        while not os.path.lexists(above) and above != above.parent:
            above = above.parent
        with tempfile.TemporaryFile(dir=above):  # without a name; permissions do not tell of a read-only disk
            pass
    except (OSError, ValueError) as error:
        raise InputError(f'Nothing can be written in {folder} ({_reason(error)}); choose another folder.') from error


def is_same(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two paths lead to one file, by links too."""
    with suppress(OSError, ValueError):
        return os.path.samefile(path, other)
    return False


def contains(path: Path, mark: str) -> bool:
    """Whether a text file contains a text."""
    with suppress(OSError):
        return mark in path.read_text(encoding='utf-8', errors='replace')
    return False


@contextmanager
def atomic_write(path: Path) -> Iterator[str]:
    """Yield a temporary file name beside ``path``; it is renamed to ``path`` unless an exception is raised.

    The file is on the disk before it is renamed, so that a crash of the machine leaves the old file or the new one.
    What killed processes left in the folder is removed.

    Raises:
        InputError: the file cannot be written.
    """
    with _unfinished(path, folder=False) as temporary:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # only the owner can read a temporary file
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, which must not exist or be empty; then as :func:`atomic_write`.

    Raises:
        InputError: the folder cannot be written.
    """
    with _unfinished(path, folder=True) as temporary:
        yield Path(temporary)
        os.chmod(temporary, 0o777 & ~_umask())


def write_part(path: Path, content: bytes) -> None:
    """Write one of many files of a folder, whole or not at all, without waiting for the disk.

    For runs with a :class:`Journal`, which write a file again that a crash of the machine took.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f'.{os.getpid()}{ENDING}')
    make_folder(path.parent)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f'{path} was not written ({error.strerror}); free space or choose another folder.') from error


class Journal:
    """What a long run has done, by which a stopped run goes on where it ended.

    A file of lines: the first says which run it is, each of the others has the position of one thing that is done, in
    rising order, and what came out. Lines that were cut off by a kill are removed.

    Args:
        path: The file.
        run: What the run was asked to do, as JSON has it.
        replace: Replace the file of another run.

    Attributes:
        begin: Position after the last one that is done.
        done: How many things are done.

    Raises:
        InputError: the file is of another run, another process writes it, or it cannot be written.
    """

    def __init__(self, path: Path, run: dict, replace: bool = False) -> None:
        self.path, self.begin, self.done = path, 0, 0
        make_folder(path.parent)
        try:
            self.file = open(path, 'ab+')  # noqa: SIM115
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f'{path} is written by another run; wait for it, or choose another folder.') from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                raise InputError(f'{path} cannot be written ({error.strerror}); choose another folder.') from error
        self.file.seek(0)
        first = json.dumps(run).encode() + b'\n'
        same, others = self.file.readline() == first, self.file.readline()
        if others and not same and not replace:
            raise InputError(
                f'{path} is of a run that was stopped, on other images, with another checkpoint or other options; go '
                'on with those, choose another folder, or add --overwrite (overwrite=True).'
            )
        if same:
            self.file.truncate(self._end(len(first)))
        else:
            self.file.truncate(0)
            self._write(first)

    def _end(self, end: int) -> int:
        """Where the last whole line ends, at ``end`` at least; what the lines say is counted."""
        self.file.seek(end)
        for line in self.file:
            try:
                position, _ = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b'\n'):
                break
            self.begin, self.done, end = position + 1, self.done + 1, end + len(line)
        return end

    def append(self, entries: Iterable[tuple[int, Any]]) -> None:
        """Add what came out, by position."""
        lines = [json.dumps(entry).encode() + b'\n' for entry in entries]
        self._write(b''.join(lines))
        self.done += len(lines)

    def _write(self, content: bytes) -> None:
        try:
            self.file.write(content)
            self.file.flush()
        except OSError as error:
            raise InputError(
                f'{self.path} was not written ({error.strerror}); free space and start again to go on.'
            ) from error

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Positions and what came out."""
        with self.path.open('rb') as file:
            next(file)
            for line in file:
                yield tuple(json.loads(line))

    def remove(self) -> None:
        """The run is complete, or nothing is done."""
        self.path.unlink(missing_ok=True)
        self.file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.done:
            self.remove()
            with suppress(OSError):  # not empty
                self.path.parent.rmdir()
        self.file.close()


@contextmanager
def _unfinished(path: Path, folder: bool) -> Iterator[str]:
    """Make a temporary file or folder, locked as long as this process lives, and rename it to ``path``."""
    make_folder(path.parent)
    remove_leftovers(path.parent)
    try:
        temporary, lock = _make_temporary(path, folder)
    except OSError as error:
        raise InputError(f'{path} cannot be written ({error.strerror}); choose another folder.') from error
    try:
        yield temporary
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not FULL_DISK.search(str(error)):
            raise  # a fault of what was to be written
        raise InputError(
            f'{path} was not written ({first_line(error)}); free space or choose another folder.'
        ) from error
    finally:
        UNFINISHED.discard(temporary)
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            Path(temporary).unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _make_temporary(path: Path, folder: bool) -> tuple[str, int | None]:
    arguments = dict(dir=path.parent, prefix=f'.{short_name(path.name, 60)}.', suffix=ENDING)
    while True:
        if folder:
            temporary = tempfile.mkdtemp(**arguments)
        else:
            handle, temporary = tempfile.mkstemp(**arguments)
            os.close(handle)
        UNFINISHED.add(temporary)
        with suppress(FileNotFoundError):
            lock = _lock(temporary)
            if lock is None or os.fstat(lock).st_nlink:
                return temporary, lock
            os.close(lock)
        UNFINISHED.discard(temporary)  # another process took it for a leftover before it was locked


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of processes that were killed: those that no process has locked."""
    for path in folder.glob(f'.*{ENDING}'):
        with suppress(OSError):  # another process removes it too
            lock = _lock(path, fcntl.LOCK_NB)
            if lock is None:
                continue
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(lock)


def _lock(path: str | os.PathLike, flags: int = 0) -> int | None:
    """Lock a file or folder until the handle is closed; None if that fails, as on file systems without locks."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | flags)
    except OSError:
        os.close(handle)
        return None
    return handle


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
        Path(temporary).write_text(text, encoding='utf-8', errors='backslashreplace')


def read_text(path: str | os.PathLike) -> str:
    """What a text file says that a person or a tool wrote, see :func:`decode_text`.

    Raises:
        InputError: the file cannot be read, or is in another encoding.
    """
    try:
        return decode_text(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f'{path} cannot be read ({error.strerror}); give a text file.') from error
    except UnicodeDecodeError as error:
        raise InputError(f'{path} is not in UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8.') from error


def decode_text(content: bytes) -> str:
    """Text from UTF-8, or from UTF-16 with a byte order mark."""
    return content.decode('utf-16' if content.startswith((b'\xff\xfe', b'\xfe\xff')) else 'utf-8-sig')


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file that are not empty, without the spaces around them; raises as :func:`read_text`."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the exception's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, 'strerror', None) or first_line(error)


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
