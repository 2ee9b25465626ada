"""Download one file by HTTP over a slow or unreliable connection.

requests and urllib3 retry errors before the first byte (no connection, status 429 and 5xx), with back-off or after the
delay that the server asks for. This module adds what they, pooch and huggingface_hub lack: it resumes a dropped
connection as long as each attempt makes progress, and gives up on a server that sends a byte a second.
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from urllib3 import BaseHTTPResponse, Retry
from urllib3.exceptions import HTTPError

from mmmilan.files import first_line

ATTEMPTS = 5  # in a row without progress
BACKOFF = 1.0  # seconds before the second attempt, then doubled
LONGEST_WAIT = 60.0  # limit in seconds on the delay that a server asks for
MINIMUM_RATE = 1 << 10  # bytes a second
TRY_AGAIN = (429, 500, 502, 503, 504)
_CHUNK = 1 << 20


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
