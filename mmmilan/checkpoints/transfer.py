"""One file by HTTP, over a bad line and from a server that misbehaves.

requests and urllib3 retry what fails before the first byte (no connection, status 429 and 5xx, with back-off or after
the time that the server names). Neither they, nor pooch, nor huggingface_hub go on after a connection was dropped for
as long as that brings more of the file, or give up a server that sends a byte a second: that is here.
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

ATTEMPTS = 5  # in a row that bring next to nothing
BACKOFF = 1.0  # seconds before the second attempt, then doubled
LONGEST_WAIT = 60.0  # seconds that a server may ask for
MINIMUM_RATE = 1 << 10  # bytes a second
TRY_AGAIN = (429, 500, 502, 503, 504)
_CHUNK = 1 << 20


class TransferError(Exception):
    """An address did not give the file. The message names no address, which may hold a password."""


class _Retry(Retry):
    """urllib3's, which would wait for as long as the server says."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds, LONGEST_WAIT)


def shown(url: str) -> str:
    """A URL without what may be secret: name and password, query, fragment."""
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
        part: where it goes; what is there already is continued if ``exact``.
        exact: whether its hash is known. Only then a wrong mixture of two answers is found out afterwards; else an
            answer counts if it is whole, of the length that it declares.
        timeout: seconds without a byte, or with fewer than ``MINIMUM_RATE`` a second, that end an attempt.

    Raises:
        TransferError: the address did not give the file.
        OSError: it cannot be written.
    """
    fruitless = 0
    with _session() as session:
        while True:
            before = part.stat().st_size if exact and part.exists() else 0
            try:
                return _receive_once(session, address, part, before, exact, timeout)
            except HTTPError as error:  # in the body: urllib3 wraps what the network does
                gained = part.stat().st_size - before
                fruitless = 0 if exact and gained >= MINIMUM_RATE * timeout else fruitless + 1
                if fruitless == ATTEMPTS:
                    raise TransferError(_reason(error)) from error
            time.sleep(BACKOFF * (2**fruitless - 1))


@contextmanager
def _session() -> Iterator[requests.Session]:
    """A session that tries again, in silence: urllib3 would log the whole address each time."""
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
    """One request; what it brings is added to ``part``, or replaces it if the server cannot go on at ``offset``."""
    headers = {'User-Agent': 'mmmilan', 'Accept-Encoding': 'identity'}
    if offset:
        headers['Range'] = f'bytes={offset}-'
    try:
        response = session.get(address, headers=headers, stream=True, timeout=timeout)
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
        raise TransferError('no address of HTTP') from None  # the exception would tell the address
    except (requests.RequestException, HTTPError, http.client.HTTPException, ValueError) as error:
        raise TransferError(_reason(error)) from None
    with response:
        if offset and response.status_code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # it was there whole
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
    """Length of the whole file, None if the server does not say and the hash will."""
    encoding, length = response.headers.get('Content-Encoding', 'identity'), response.headers.get('Content-Length')
    if encoding != 'identity':
        raise TransferError(f'it is sent packed ({encoding!r:.40})')
    if length is None and exact:
        return None
    if length is None or not re.fullmatch(r'\d{1,18}', length, re.ASCII):
        raise TransferError(f'its length is given as {length!r:.40}')
    if not exact and response.status_code != 200:
        raise TransferError('the server gives a part of it')
    return offset + int(length)


def _write(body: BaseHTTPResponse, part: Path, offset: int, total: int | None, timeout: float) -> None:
    """Write what comes, as soon as it comes, at ``offset``.

    Raises:
        HTTPError: the connection was dropped, or nothing or too little came for ``timeout`` seconds.
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
    """What lies at the bottom of an exception of requests, in a few words and without the address."""
    while True:
        parts = (*error.args, getattr(error, 'reason', None), error.__cause__)
        below = next((part for part in parts if isinstance(part, Exception)), None)
        if below is None:
            break
        error = below
    if 'timed out' in str(error):
        return 'timed out'
    return f'{getattr(error, "strerror", None) or first_line(error):.100}'
