"""Downloads that can be trusted: checked by hash, resumed, shared by processes, whole or not there.

``MMMILAN_CACHE`` names the folder (default ``~/.cache/mmmilan``), ``MMMILAN_MIRRORS`` the addresses to try in turn in
place of OpenMMLab's, separated by commas.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import filelock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from mmmilan.errors import InputError

# The same files under the same paths: the original host, and that of the maintained line.
MIRRORS = ('https://download.openmmlab.com/', 'https://mmassets.onedl.ai/')
_HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.\w+$', re.IGNORECASE)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_CHUNK = 1 << 20


class _Failure(Exception):
    """One address did not give the file; the next may."""


def cache_dir() -> Path:
    """The folder of downloaded files."""
    return Path(os.environ.get('MMMILAN_CACHE') or '~/.cache/mmmilan').expanduser()


def addresses(url: str) -> list[str]:
    """Where to look for a file: at each mirror if OpenMMLab publishes it, else at its own address."""
    mirrors = [mirror.strip() for mirror in os.environ.get('MMMILAN_MIRRORS', '').split(',') if mirror.strip()]
    for official in MIRRORS:
        if url.startswith(official):
            return [f'{mirror.rstrip("/")}/{url.removeprefix(official)}' for mirror in mirrors or MIRRORS]
    return [url]


def download(url: str, sha256: str | None = None, timeout: float = 30) -> Path:
    """The file at a URL, from the cache or from the network.

    Args:
        url: address of the file; a hash at the end of its name, as in ``-180922e8.pth``, is checked.
        sha256: the whole hash, where it is known.
        timeout: seconds without a byte after which a server is given up.

    Returns:
        Path of the file in the cache.

    Raises:
        InputError: no address gave the file, or it cannot be written.
    """
    name = urllib.parse.urlsplit(url).path.rpartition('/')[2]  # a query or fragment is no part of it
    in_name = _HASH_IN_NAME.search(name)
    digest = (sha256 or (in_name[1] if in_name else '')).lower() or None
    if digest is None:  # two files may have this name
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}'
    target = cache_dir() / name
    if _is_whole(target, digest):
        return target
    with _locked(target):
        if _is_whole(target, digest):  # another process was faster
            return target
        failures = []
        for address in addresses(url):
            try:
                _fetch(address, target, digest, timeout)
                return target
            except _Failure as failure:
                failures.append(f'{address}: {failure}')
    other = ''
    if target.is_file():
        other = f' and {target} is another file, its hash is {file_sha256(target)[: len(digest)]} and not {digest}'
    raise InputError(
        f'{url.rpartition("/")[2]} could not be downloaded ({", ".join(failures)}){other}; put the file at {target}, '
        'or name a mirror that can be reached in MMMILAN_MIRRORS.'
    )


def file_sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_whole(target: Path, digest: str | None) -> bool:
    if not target.is_file():
        return False
    if digest is None or file_sha256(target).startswith(digest):
        return True
    print(f'{target} does not have the hash {digest}: downloading it again', file=sys.stderr)
    return False


def _locked(target: Path) -> filelock.AcquireReturnProxy:
    lock = filelock.FileLock(f'{target}.lock')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f'waiting for another process that downloads {target.name}', file=sys.stderr)
        return lock.acquire()
    except OSError as error:
        raise _cannot_write(target, error) from error


def _cannot_write(target: Path, error: OSError) -> InputError:
    return InputError(f'{target} cannot be written ({error.strerror}); name another folder in MMMILAN_CACHE.')


def _fetch(address: str, target: Path, digest: str | None, timeout: float) -> None:
    """Receive one file, going on where a connection was dropped for as long as that brings more of it."""
    part = target.with_name(f'{target.name}.part')
    received = -1
    while True:
        resumed = part.stat().st_size if part.exists() and digest else 0  # without a hash a mix would go unnoticed
        try:
            _receive(address, part, resumed, timeout)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not resumed:
                raise _Failure(f'{error.code} {error.reason}') from error
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, 'errno', None) in _DISK_ERRORS:
                raise _cannot_write(target, error) from error
            size = part.stat().st_size if part.exists() else 0
            if isinstance(error, urllib.error.URLError) or size <= received:
                raise _Failure(getattr(error, 'reason', None) or error) from error
            received = size
            continue
        if digest is None or file_sha256(part).startswith(digest):
            os.replace(part, target)
            return
        part.unlink()
        if not resumed:
            raise _Failure(f'the file does not have the hash {digest}')


def _receive(address: str, part: Path, offset: int, timeout: float) -> None:
    """One request; what it brings is added to ``part``, or replaces it if the server cannot go on at ``offset``."""
    headers = {'User-Agent': 'mmmilan', **({'Range': f'bytes={offset}-'} if offset else {})}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=timeout) as response:
        if not response.headers.get('Content-Range', '').startswith(f'bytes {offset}-'):
            offset = 0
        length = response.headers.get('Content-Length')
        total = offset + int(length) if length else None
        if total and shutil.disk_usage(part.parent).free < total - offset:
            raise OSError(errno.ENOSPC, f'{os.strerror(errno.ENOSPC)}, {total >> 20} MiB needed')
        columns = ['{task.description}', BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=Console(stderr=True)) as progress, part.open('ab' if offset else 'wb') as file:
            task = progress.add_task(part.stem, total=total, completed=offset)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.update(task, advance=len(chunk))
    size = part.stat().st_size
    if total and size != total:
        raise ConnectionError(f'the connection ended after {size} of {total} bytes')
