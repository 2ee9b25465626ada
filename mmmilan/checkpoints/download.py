"""Download files into a cache: checked by hash, resumed, shared by processes, complete or absent.

``MMMILAN_CACHE`` names the folder (default ``~/.cache/mmmilan``), ``MMMILAN_MIRRORS`` a comma-separated list of
addresses to try in turn in place of OpenMMLab's.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import filelock

from mmmilan.checkpoints.transfer import TransferError, receive, shown
from mmmilan.errors import InputError

# Hosts of the same files under the same paths: the original one, and that of the maintained line.
MIRRORS = ('https://download.openmmlab.com/', 'https://mmassets.onedl.ai/')
_HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.\w+$', re.IGNORECASE)
_HASH_OF_FOLDER = re.compile(r'/([0-9a-f]{64})/[^/]+$')  # OpenAI's addresses of CLIP
_LONGEST_NAME = 200  # bytes; file systems take 255, with a hash and '.part'
_CHUNK = 1 << 20


def cache_dir() -> Path:
    """The folder of downloaded files."""
    return Path(os.environ.get('MMMILAN_CACHE') or '~/.cache/mmmilan').expanduser()


def addresses(url: str) -> list[str]:
    """The URLs to try for a file: at each mirror if OpenMMLab publishes it, else its own URL."""
    mirrors = [mirror.strip() for mirror in os.environ.get('MMMILAN_MIRRORS', '').split(',') if mirror.strip()]
    for official in MIRRORS:
        if url.startswith(official):
            return [f'{mirror.rstrip("/")}/{url.removeprefix(official)}' for mirror in mirrors or MIRRORS]
    return [url]


def download(url: str, sha256: str | None = None, timeout: float = 30) -> Path:
    """The file at a URL, from the cache or from the network.

    Args:
        url: URL of the file; a hash at the end of its name, as in ``-180922e8.pth``, or as the name of its folder is
            checked.
        sha256: the full hash, if it is known.
        timeout: an attempt fails after this many seconds without data, or with too little.

    Returns:
        Path of the file in the cache.

    Raises:
        InputError: no URL gave the file, or it cannot be written. The message contains no passwords.
    """
    try:
        path = urlsplit(url).path  # without query and fragment
    except ValueError:
        path = ''
    name = path.rpartition('/')[2]
    if name in ('', '.', '..') or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
        raise InputError(f'{shown(url)[:_LONGEST_NAME]!r} names no file; give the URL of one.')
    in_name = _HASH_IN_NAME.search(name) or _HASH_OF_FOLDER.search(path)
    digest = (sha256 or (in_name[1] if in_name else '')).lower() or None
    if digest is None:  # files at different URLs may have this name
        name = f'{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}'
    target = cache_dir() / name
    if _is_complete(target, digest):
        return target
    with _locked(target):
        if _is_complete(target, digest):  # another process was faster
            return target
        failures = []
        for address in addresses(url):
            try:
                _fetch(address, target, digest, timeout)
                return target
            except TransferError as failure:
                failures.append(f'{shown(address)}: {failure}')
    other = ''
    if target.is_file():
        other = f' and {target} is a different file with hash {file_sha256(target)[: len(digest)]} and not {digest}'
    raise InputError(
        f'{shown(url).rpartition("/")[2]} could not be downloaded ({", ".join(failures)}){other}; put the file at '
        f'{target}, or name a reachable mirror in MMMILAN_MIRRORS.'
    )


def file_sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_complete(target: Path, digest: str | None) -> bool:
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
    """Download a file, check its hash and move it into the cache."""
    part = target.with_name(f'{target.name}.part')
    while True:
        continued = digest is not None and part.exists()
        try:
            receive(address, part, digest is not None, timeout)
        except OSError as error:
            raise _cannot_write(target, error) from error
        if digest is None or file_sha256(part).startswith(digest):
            os.replace(part, target)
            return
        part.unlink()
        if not continued:
            raise TransferError(f'the file does not have the hash {digest}')
