"""Faulty servers and connections: the file arrives whole, or one sentence without credentials says why not."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler

import pytest

from mmmilan.checkpoints import download as downloads
from mmmilan.checkpoints.download import download
from mmmilan.errors import InputError
from processes import Server, serve_http

CONTENT = random.Random(0).randbytes(40 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f'model-{SHA256[:8]}.pth'
SMALL = b'x' * 5000


class Handler(BaseHTTPRequestHandler):
    """Leaves each request to ``server.answer``."""

    def do_GET(self) -> None:  # noqa: N802
        self.server.times.append(time.monotonic())
        asked = self.headers.get('Range', 'bytes=0-')
        self.server.answer(self, int(asked.removeprefix('bytes=').removesuffix('-')))

    def begin(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), str(value))
        self.end_headers()

    def begin_file(self, offset: int, content: bytes) -> None:
        headers = dict(Content_Range=f'bytes {offset}-{len(content) - 1}/{len(content)}') if offset else {}
        self.begin(206 if offset else 200, Content_Length=len(content) - offset, **headers)

    def reset(self) -> None:
        """Reset the connection, as a router does that lost track of it."""
        self.wfile.flush()
        time.sleep(0.02)  # until what was sent has arrived
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.connection.close()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Start a server with this answer; returns it with its ``url``."""
    monkeypatch.setenv('MMMILAN_CACHE', str(tmp_path))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.delenv('MMMILAN_MIRRORS', raising=False)
    monkeypatch.setattr(downloads, 'BACKOFF', 0.01)
    with ExitStack() as servers:

        def start(answer: Callable[[Handler, int], None]) -> Server:
            server = servers.enter_context(serve_http(Handler))
            server.answer, server.times = answer, []
            return server

        yield start


def test_twenty_resets(serve):
    """At random places of 40 MB; one call downloads the file."""
    stops = sorted(random.Random(1).sample(range(1, len(CONTENT)), 20))

    def answer(handler: Handler, offset: int) -> None:
        stop = next((stop for stop in stops if stop > offset + 100_000), None)
        handler.begin_file(offset, CONTENT)
        handler.wfile.write(CONTENT[offset:stop])
        if stop:
            handler.reset()

    server = serve(answer)
    assert download(f'{server.url}/{NAME}', timeout=5).read_bytes() == CONTENT
    assert len(server.times) > 15


@pytest.mark.parametrize('name', ['plain.pth', NAME])
def test_a_drip_is_given_up(serve, name):
    def answer(handler: Handler, offset: int) -> None:
        handler.begin_file(0, CONTENT)
        for index in range(1000):
            handler.wfile.write(CONTENT[index : index + 1])
            time.sleep(0.02)

    server, begin = serve(answer), time.monotonic()
    with pytest.raises(InputError, match='fewer than 1024 bytes a second arrived'):
        download(f'{server.url}/{name}', timeout=0.2)
    assert len(server.times) == downloads.ATTEMPTS
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize('status', downloads.TRY_AGAIN)
def test_a_busy_server_is_asked_again(serve, status):
    def answer(handler: Handler, offset: int) -> None:
        if len(handler.server.times) < 4:
            return handler.begin(status, Content_Length=0)
        handler.begin_file(0, SMALL)
        return handler.wfile.write(SMALL)

    server = serve(answer)
    assert download(f'{server.url}/plain.pth').read_bytes() == SMALL
    assert len(server.times) == 4


@pytest.mark.parametrize('status', downloads.TRY_AGAIN)
def test_a_server_that_stays_busy(serve, status):
    server = serve(lambda handler, offset: handler.begin(status, Content_Length=0))
    with pytest.raises(InputError, match=f'plain.pth: {status} '):
        download(f'{server.url}/plain.pth')
    assert len(server.times) == downloads.ATTEMPTS + 1


@pytest.mark.parametrize('asked, waited', [('1', 1.0), ('100000', 0.3)])
def test_the_time_that_a_server_asks_for(serve, monkeypatch, asked, waited):
    """The download waits for that time, up to a limit."""
    monkeypatch.setattr(downloads, 'LONGEST_WAIT', 1.0 if asked == '1' else 0.3)

    def answer(handler: Handler, offset: int) -> None:
        if len(handler.server.times) == 1:
            return handler.begin(429, Retry_After=asked, Content_Length=0)
        handler.begin_file(0, SMALL)
        return handler.wfile.write(SMALL)

    server = serve(answer)
    assert download(f'{server.url}/plain.pth').read_bytes() == SMALL
    first, second = server.times
    assert waited <= second - first < waited + 1


def packed(handler: Handler, offset: int) -> None:
    handler.begin(200, Content_Length=len(SMALL), Content_Encoding='gzip')
    handler.wfile.write(SMALL)


WITHOUT_LENGTH = b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n'
CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n'
PART = b'HTTP/1.1 206 Partial Content\r\nContent-Length: 5000\r\nContent-Range: bytes 0-4999/9000\r\n\r\n'
LENGTH = 'HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n'
# Status line and headers, and what the message says
FAULTY = [
    (WITHOUT_LENGTH, 'its length is given as None'),
    (CHUNKED, 'its length is given as None'),
    (PART, 'a part of it'),
    (LENGTH.format('many').encode(), "its length is given as 'many'"),
    (LENGTH.format('-5').encode(), "its length is given as '-5'"),
    (LENGTH.format('5000, 6000').encode(), 'Content-Length contained multiple'),
    (LENGTH.format('9' * 30).encode(), "its length is given as '9999"),
    (LENGTH.format(6000).encode(), 'the connection ended after 5000 of 6000 bytes'),
    (b'HTTP/1.1 204 No Content\r\n\r\n', '204 No Content'),
    (b'HTTP/1.1 203 Other\r\nContent-Length: 5000\r\n\r\n', '203 Other'),
    (b'garbage\r\n\r\n', 'garbage'),
    (b'HTTP/1.1 abc OK\r\n\r\n', 'HTTP/1.1 abc OK'),
    (b'HTTP/1.1 200 OK\r\n' + b'X: y\r\n' * 200 + b'\r\n', 'got more than 100 headers'),
    (b'HTTP/1.1 200 OK\r\nX: ' + b'y' * 70000 + b'\r\n\r\n', 'got more than 65536 bytes'),
    (b'HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n', 'Invalid IPv6 URL'),
    (b'HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n', 'not an HTTP address'),
    (b'HTTP/1.1 302 Found\r\nLocation: /plain.pth\r\nContent-Length: 0\r\n\r\n', 'Exceeded 30 redirects'),
    (b'', 'xxxxx'),
]


def answer_raw(head: bytes, content: bytes = SMALL) -> Callable[[Handler, int], None]:
    """An answer with this status line and these headers."""

    def answer(handler: Handler, offset: int) -> None:
        handler.wfile.write(head + content)
        handler.close_connection = True

    return answer


@pytest.mark.parametrize('head, message', FAULTY)
def test_without_a_hash_only_a_whole_answer_counts(serve, tmp_path, head, message):
    server = serve(answer_raw(head, b'' if head == CHUNKED else SMALL))
    with pytest.raises(InputError) as error:
        download(f'{server.url}/plain.pth', timeout=1)
    assert message in str(error.value) and '\n' not in str(error.value)
    assert not list(tmp_path.glob('*plain.pth'))


def test_a_bad_header_is_left_out(serve):
    server = serve(answer_raw(b'HTTP/1.1 200\r\nContent-Length: 5000\r\nbad header\r\n\r\n'))
    assert download(f'{server.url}/plain.pth', timeout=1).read_bytes() == SMALL


def test_a_packed_answer_is_not_the_file(serve):
    with pytest.raises(InputError, match=r"the server sends it compressed \('gzip'\)"):
        download(f'{serve(packed).url}/plain.pth')


SECRET = 'pass-word'
ADDRESSES = [
    f'http://name:{SECRET}@127.0.0.1:1/x.pth?token={SECRET}#{SECRET}',
    f'http://name:{SECRET}@[::1/x.pth',
    f'http://name:{SECRET}@127.0.0.1:99999999/x.pth',
    f'http://name:{SECRET}@a..b/x.pth',
    f'http://name:{SECRET}@{"a" * 300}/x.pth',
    f'http://name:{SECRET}@/x.pth',
    f'name:{SECRET}@127.0.0.1/x.pth',
    f'ftp://name:{SECRET}@127.0.0.1/x.pth',
    f'file:///etc/x.pth?{SECRET}',
    f'http://name:{SECRET}@127.0.0.1:1/',
    f'http://name:{SECRET}@127.0.0.1:1/..',
    f'http://name:{SECRET}@127.0.0.1:1',
    f'http://127.0.0.1:1/x\0y.pth?{SECRET}',
    f'http://127.0.0.1:1/{"x" * 300}.pth?{SECRET}',
    f'?{SECRET}',
    '',
]


@pytest.mark.parametrize('url', ADDRESSES)
def test_bad_addresses(serve, caplog, capfd, url):
    with pytest.raises(InputError) as error:
        download(url, timeout=1)
    told = str(error.value) + caplog.text + ''.join(capfd.readouterr())
    assert SECRET not in told and '\n' not in str(error.value) and '; ' in str(error.value)


@pytest.mark.parametrize('mirror', [f'http://u:{SECRET}@127.0.0.1:1', 'http://[', 'nonsense', '/', f'x://{SECRET}@y'])
def test_bad_mirrors(serve, monkeypatch, mirror):
    monkeypatch.setenv('MMMILAN_MIRRORS', mirror)
    with pytest.raises(InputError, match=r'x\.pth could not be downloaded \(') as error:
        download('https://download.openmmlab.com/x.pth', timeout=1)
    assert SECRET not in str(error.value) and '\n' not in str(error.value)


def test_a_password_in_the_address_is_used(serve):
    def answer(handler: Handler, offset: int) -> None:
        if handler.headers.get('Authorization') != 'Basic bmFtZTpwdw==':
            return handler.begin(401, Content_Length=0)
        handler.begin_file(0, SMALL)
        return handler.wfile.write(SMALL)

    url = serve(answer).url
    assert download(url.replace('//', '//name:pw@') + '/plain.pth').read_bytes() == SMALL
    with pytest.raises(InputError, match='401 Unauthorized'):
        download(f'{url}/plain.pth')
