"""Download files into a cache: checked by hash, resumed, shared by processes, complete or absent.

``MMMILAN_CACHE`` names the folder (default ``~/.cache/mmmilan``), ``MMMILAN_MIRRORS`` a comma-separated list of
addresses to try in turn in place of OpenMMLab's.

requests and urllib3 retry errors before the first byte (no connection, status 429 and 5xx), with back-off or after the
delay that the server asks for. This module adds what they, pooch and huggingface_hub lack: it resumes a dropped
connection as long as each attempt makes progress, and gives up on a server that sends a byte a second.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import filelock
import requests
from requests.adapters import HTTPAdapter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from urllib3 import BaseHTTPResponse, Retry
from urllib3.exceptions import HTTPError

from mmmilan.errors import InputError
from mmmilan.files import first_line

# Hosts of the same files under the same paths: the original one, and that of the maintained line.
MIRRORS = ('https://download.openmmlab.com/', 'https://mmassets.onedl.ai/')
_DATE = r'(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{4}|\d{6})?'  # and maybe the time
_HASH_IN_NAME = re.compile(rf'-(?!{_DATE}\.)([0-9a-f]{{8,64}})\.\w+$', re.IGNORECASE)
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


ATTEMPTS = 5  # in a row without progress
BACKOFF = 1.0  # seconds before the second attempt, then doubled
LONGEST_WAIT = 60.0  # limit in seconds on the delay that a server asks for
MINIMUM_RATE = 1 << 10  # bytes a second
TRY_AGAIN = (429, 500, 502, 503, 504)


class TransferError(Exception):
    """A download failed. The message does not contain the address, which may hold a password."""


class _Retry(Retry):
    """urllib3's ``Retry``, with a limit on the delay that the server asks for."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds, LONGEST_WAIT)


def shown(url: str) -> str:
    """A URL without its possible secrets: user name, password, query, fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return 'an address that cannot be read'
    if not parts.netloc:
        return parts.path.rpartition('@')[2]
    return f'{parts.scheme}://{parts.netloc.rpartition("@")[2]}{parts.path}'


def receive(address: str, part: Path, exact: bool, timeout: float) -> None:
    """Receive a file into ``part``.

    Args:
        address: its URL.
        part: the file to write; a partial file is resumed if ``exact``.
        exact: whether the caller will check a hash, which detects parts of two different files. Without one, the file
            is never resumed, and must have the length that the server declares.
        timeout: an attempt ends after this many seconds without data, or with fewer than ``MINIMUM_RATE`` bytes a
            second.

    Raises:
        TransferError: the download failed.
        OSError: the file cannot be written.
    """
    fruitless = 0
    with _session() as session:
        while True:
            before = part.stat().st_size if exact and part.exists() else 0
            try:
                return _receive_once(session, address, part, before, exact, timeout)
            except HTTPError as error:  # urllib3's wrapper of network errors within the body
                gained = part.stat().st_size - before
                fruitless = 0 if exact and gained >= MINIMUM_RATE * timeout else fruitless + 1
                if fruitless == ATTEMPTS:
                    raise TransferError(_reason(error)) from error
            time.sleep(BACKOFF * (2**fruitless - 1))


@contextmanager
def _session() -> Iterator[requests.Session]:
    """A session that retries. Its log is off, as urllib3 would log the whole address each time."""
    retry = _Retry(
        total=ATTEMPTS, connect=2, read=2, backoff_factor=BACKOFF, status_forcelist=TRY_AGAIN, raise_on_status=False
    )
    logger = logging.getLogger('urllib3.connectionpool')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with requests.Session() as session:
            for scheme in ('http://', 'https://'):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            yield session
    finally:
        logger.setLevel(level)


def _receive_once(
    session: requests.Session, address: str, part: Path, offset: int, exact: bool, timeout: float
) -> None:
    """One request. Its data are appended to ``part``, or replace it if the server does not resume at ``offset``."""
    headers = {'User-Agent': 'mmmilan', 'Accept-Encoding': 'identity'}
    if offset:
        headers['Range'] = f'bytes={offset}-'
    try:
        response = session.get(address, headers=headers, stream=True, timeout=timeout)
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
        raise TransferError('not an HTTP address') from None  # the exception holds the address
    except (requests.RequestException, HTTPError, http.client.HTTPException, ValueError) as error:
        raise TransferError(_reason(error)) from None
    with response:
        if offset and response.status_code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # the file was already complete
        if response.headers.get('Content-Range', '').startswith(f'bytes {offset}-') and response.status_code == 206:
            pass
        elif response.status_code == 200:
            offset = 0
        else:
            raise TransferError(f'{response.status_code} {response.reason}'.strip())
        total = _length(response, offset, exact)
        if total is not None and shutil.disk_usage(part.parent).free < total - offset:
            raise OSError(errno.ENOSPC, f'{os.strerror(errno.ENOSPC)}, {total >> 20} MiB needed')
        _write(response.raw, part, offset, total, timeout)


def _length(response: requests.Response, offset: int, exact: bool) -> int | None:
    """Length of the complete file; None if the server does not declare it and a hash will be checked."""
    encoding, length = response.headers.get('Content-Encoding', 'identity'), response.headers.get('Content-Length')
    if encoding != 'identity':
        raise TransferError(f'the server sends it compressed ({encoding!r:.40})')
    if length is None and exact:
        return None
    if length is None or not re.fullmatch(r'\d{1,18}', length, re.ASCII):
        raise TransferError(f'its length is given as {length!r:.40}')
    if not exact and response.status_code != 200:
        raise TransferError('the server sends only a part of it')
    return offset + int(length)


def _write(body: BaseHTTPResponse, part: Path, offset: int, total: int | None, timeout: float) -> None:
    """Append data to the file as they arrive, from ``offset``.

    Raises:
        HTTPError: the connection was dropped, or too little data arrived for ``timeout`` seconds.
    """
    body.enforce_content_length = False  # the length is compared below
    columns = ['{task.description}', BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as progress, part.open('ab' if offset else 'wb') as file:
        task = progress.add_task(part.stem, total=total, completed=offset)
        begin, arrived = time.monotonic(), 0
        while chunk := body.read1(_CHUNK, decode_content=False):
            file.write(chunk)
            progress.update(task, advance=len(chunk))
            arrived += len(chunk)
            if time.monotonic() - begin > timeout:
                if arrived < MINIMUM_RATE * timeout:
                    raise HTTPError(f'fewer than {MINIMUM_RATE} bytes a second arrived')
                begin, arrived = time.monotonic(), 0
    size = part.stat().st_size
    if total is not None and size != total:
        raise HTTPError(f'the connection ended after {size} of {total} bytes')


def _reason(error: BaseException) -> str:
    """The root cause of an exception of requests, in a few words and without the address."""
    while True:
        parts = (*error.args, getattr(error, 'reason', None), error.__cause__)
        below = next((part for part in parts if isinstance(part, Exception)), None)
        if below is None:
            break
        error = below
    if 'timed out' in str(error):
        return 'timed out'
    return f'{getattr(error, "strerror", None) or first_line(error):.100}'
