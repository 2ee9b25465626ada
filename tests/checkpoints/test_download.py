"""Downloads from an HTTP server on loopback that misbehaves on demand."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from mmmilan.checkpoints import download as downloads
from mmmilan.checkpoints.download import addresses, cache_dir, download, file_sha256
from mmmilan.errors import InputError
from processes import serve_http

CONTENT = bytes(range(256)) * 12_000  # 3 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f'milan_20221129-{SHA256[:8]}.pth'


class Handler(BaseHTTPRequestHandler):
    """Answers ``/BEHAVIOUR/NAME`` and keeps path and range of each request in ``server.requests``."""

    def do_GET(self):  # noqa: N802
        behaviour = self.path.split('/')[1]
        asked = self.headers.get('Range')
        first = not any(path == self.path for path, _ in self.server.requests)
        self.server.requests.append((self.path, asked))
        if behaviour == 'missing':
            return self.send_error(404)
        if behaviour == 'silent':
            time.sleep(3)
            return None
        content = CONTENT[::-1] if behaviour == 'wrong' else CONTENT
        start = int(re.match(r'bytes=(\d+)-', asked)[1]) if asked and behaviour != 'norange' else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        stop = len(content)
        if behaviour == 'truncated' or (behaviour in ('drop', 'stall', 'norange') and first):
            stop = len(content) // 2
        if behaviour == 'slow':
            for i in range(start, stop, 1 << 18):
                self.wfile.write(content[i : i + (1 << 18)])
                time.sleep(0.1)
            return None
        self.wfile.write(content[start:stop])
        self.wfile.flush()
        if behaviour == 'stall' and first:
            time.sleep(3)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv('MMMILAN_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(downloads, 'BACKOFF', 0.01)
    monkeypatch.delenv('MMMILAN_MIRRORS', raising=False)
    with serve_http(Handler) as server:
        server.requests = []
        yield server


def cached_files() -> list[str]:
    """Names of the files in the cache, without locks."""
    folder = Path(os.environ['MMMILAN_CACHE'])
    return sorted(path.name for path in folder.iterdir() if path.suffix != '.lock')


def run(code: str) -> subprocess.Popen:
    """Run code that downloads in another process."""
    code = f'from mmmilan.checkpoints.download import download\n{code}'
    return subprocess.Popen([sys.executable, '-c', code], stdout=-1, stderr=-1, text=True)


def test_file_is_checked_kept_and_not_requested_again(server, capsys):
    path = download(f'{server.url}/good/{NAME}')
    assert path.read_bytes() == CONTENT and path.name == NAME
    assert download(f'{server.url}/good/{NAME}', sha256=SHA256) == path
    assert len(server.requests) == 1
    assert cached_files() == [NAME]
    assert '3.1/3.1 MB' in capsys.readouterr().err  # the progress bar has the size


def test_wrong_hash_is_not_kept(server):
    with pytest.raises(InputError, match=f'does not have the hash {SHA256[:8]}'):
        download(f'{server.url}/wrong/{NAME}')
    assert cached_files() == []
    with pytest.raises(InputError, match='does not have the hash 000'):  # the whole hash is checked where it is known
        download(f'{server.url}/good/{NAME}', sha256='0' * 64)
    assert cached_files() == []


def test_damaged_file_in_the_cache_is_replaced(server):
    path = download(f'{server.url}/good/{NAME}')
    path.write_bytes(CONTENT[:-1])
    assert download(f'{server.url}/good/{NAME}').read_bytes() == CONTENT


def test_truncated_body_is_not_a_file(server):
    with pytest.raises(InputError, match=r'the connection ended after \d+ of 3072000 bytes'):
        download(f'{server.url}/truncated/plain.pth')
    assert not any(name.endswith('plain.pth') for name in cached_files())


@pytest.mark.parametrize('behaviour', ['drop', 'stall'])
def test_dropped_or_stalled_download_continues(server, behaviour):
    assert download(f'{server.url}/{behaviour}/{NAME}', timeout=0.5).read_bytes() == CONTENT
    (_, first), (_, second) = server.requests
    assert first is None
    assert 0 < int(second.removeprefix('bytes=').removesuffix('-')) <= len(CONTENT) // 2


def test_interrupted_process_resumes(server):
    process = run(f'download({server.url!r} + "/slow/{NAME}")')
    part = Path(os.environ['MMMILAN_CACHE']) / f'{NAME}.part'
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    size = part.stat().st_size
    assert 0 < size < len(CONTENT)
    assert download(f'{server.url}/good/{NAME}').read_bytes() == CONTENT
    assert server.requests[-1] == (f'/good/{NAME}', f'bytes={size}-')
    assert cached_files() == [NAME]


def test_resume_without_range_support_starts_again(server):
    assert download(f'{server.url}/norange/{NAME}').read_bytes() == CONTENT
    assert len(server.requests) == 2 and server.requests[1][1] is not None


def test_wrong_leftover_is_dropped(server):
    folder = Path(os.environ['MMMILAN_CACHE'])
    folder.mkdir()
    for leftover in (b'x' * 1000, CONTENT + b'x', b'x' * len(CONTENT)):
        (folder / f'{NAME}.part').write_bytes(leftover)
        assert download(f'{server.url}/good/{NAME}').read_bytes() == CONTENT
        (folder / NAME).unlink()
    (folder / f'{NAME}.part').write_bytes(CONTENT)  # complete; the process ended before the last step
    assert download(f'{server.url}/good/{NAME}').read_bytes() == CONTENT
    assert server.requests[-1][1] == f'bytes={len(CONTENT)}-'


def test_missing_file_says_where_to_put_it(server):
    with pytest.raises(InputError) as error:
        download(f'{server.url}/missing/{NAME}')
    message = str(error.value)
    assert f'{server.url}/missing/{NAME}: 404 Not Found' in message
    assert f'put the file at {os.environ["MMMILAN_CACHE"]}/{NAME}' in message
    assert len(server.requests) == 1
    Path(os.environ['MMMILAN_CACHE'], NAME).write_bytes(CONTENT)
    assert download(f'{server.url}/missing/{NAME}').read_bytes() == CONTENT  # the remedy of the message works


def test_silent_server_is_given_up(server):
    start = time.monotonic()
    with pytest.raises(InputError, match='timed out'):
        download(f'{server.url}/silent/{NAME}', timeout=0.3)
    assert time.monotonic() - start < 2.5


def test_no_network_is_one_sentence(server):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))  # bound and not listening: connections are refused
        url = f'http://127.0.0.1:{unused.getsockname()[1]}/{NAME}'
        with pytest.raises(
            InputError, match=f'Connection refused.*put the file at .*/cache/{NAME}, or name a reachable mirror'
        ) as error:
            download(url)
    assert '\n' not in str(error.value)


def test_mirrors_are_tried_in_turn(server, monkeypatch):
    official = f'https://download.openmmlab.com/mmselfsup/1.x/{NAME}'
    assert addresses(official) == [official, f'https://mmassets.onedl.ai/mmselfsup/1.x/{NAME}']
    assert addresses('https://example.com/a.pth') == ['https://example.com/a.pth']
    mirrors = [f'{server.url}/{behaviour}' for behaviour in ('missing', 'wrong', 'good')]
    monkeypatch.setenv('MMMILAN_MIRRORS', f'{mirrors[0]}, {mirrors[1]}/,{mirrors[2]}')
    path = download(official)
    assert path.name == NAME and path.read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == [
        f'/{behaviour}/mmselfsup/1.x/{NAME}' for behaviour in ('missing', 'wrong', 'good')
    ]
    path.unlink()
    monkeypatch.setenv('MMMILAN_MIRRORS', mirrors[0])
    with pytest.raises(InputError, match=r'/missing/mmselfsup/1.x/.*: 404 Not Found'):
        download(official)


def test_wrong_file_in_the_cache(server):
    """A user put the wrong file where the message said: it stays, and the message gives its hash."""
    target = cache_dir() / NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b'something else')
    wrong = hashlib.sha256(b'something else').hexdigest()[:8]
    with pytest.raises(InputError, match=f'{NAME} is a different file with hash {wrong} and not {SHA256[:8]}; put '):
        download(f'{server.url}/wrong/{NAME}')
    assert target.read_bytes() == b'something else'


@pytest.mark.parametrize('date', ['20240131', '19991201', '202401311259', '20240131125959'])
def test_a_date_in_a_name_is_no_hash(server, date):
    assert download(f'{server.url}/good/my_vit-{date}.pth').read_bytes() == CONTENT


@pytest.mark.parametrize(
    'number', ['20241331', '20240132', '20240100', '21000101', '2024013a', '202401311', '12345678']
)
def test_other_numbers_in_a_name_are_hashes(server, number):
    with pytest.raises(InputError, match=f'does not have the hash {number}'):
        download(f'{server.url}/good/my_vit-{number}.pth')


def test_files_of_one_name_without_hash_do_not_mix(server):
    one, other = download(f'{server.url}/good/model.pth'), download(f'{server.url}/wrong/model.pth')
    assert one.read_bytes() == CONTENT and other.read_bytes() == CONTENT[::-1]


@pytest.mark.slow
def test_two_processes_share_one_download(server):
    processes = [run(f'print(download({server.url!r} + "/slow/{NAME}"))') for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {f'{os.environ["MMMILAN_CACHE"]}/{NAME}'}
    assert file_sha256(Path(outputs[0][0].strip())) == SHA256
    assert len(server.requests) == 1
    assert cached_files() == [NAME]


def test_full_disk(server):
    """A limit on file size stands for a full disk: writing fails midway in the same way."""
    process = run(f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
try:
    download({server.url!r} + '/good/{NAME}')
except ValueError as error:
    print(error)
""")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f'/cache/{NAME} cannot be written (File too large); name another folder in MMMILAN_CACHE' in output
    assert not (Path(os.environ['MMMILAN_CACHE']) / NAME).exists()


def test_too_little_space_is_found_before_writing(server, monkeypatch):
    usage = shutil.disk_usage('/')._replace(free=1_000_000)
    monkeypatch.setattr(downloads.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(InputError, match='No space left on device, 2 MiB needed'):
        download(f'{server.url}/good/{NAME}')
    assert cached_files() == []


@contextmanager
def not_root():
    """Drop root's rights: for root nothing is read-only."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_read_only_cache(server, monkeypatch):
    """Its files are used; a file that is missing is an error."""
    with tempfile.TemporaryDirectory() as folder:  # only root may enter pytest's own folder
        there = Path(folder) / f'there-{SHA256[:8]}.pth'
        there.write_bytes(CONTENT)
        os.chmod(folder, 0o555)
        monkeypatch.setenv('MMMILAN_CACHE', folder)
        with not_root():
            assert download(f'{server.url}/good/{there.name}') == there
            message = rf'{folder}/{NAME} cannot be written \(Permission denied\); name another'
            with pytest.raises(InputError, match=message):
                download(f'{server.url}/good/{NAME}')
        os.chmod(folder, 0o755)


@pytest.mark.parametrize('name', [f'{NAME}?download=1', f'{NAME}#part', NAME.replace(SHA256[:8], SHA256[:8].upper())])
def test_hash_is_checked_whatever_the_form_of_the_address(server, name):
    with pytest.raises(InputError, match=f'does not have the hash {SHA256[:8]}'):
        download(f'{server.url}/wrong/{name}')
    assert download(f'{server.url}/good/{name}').read_bytes() == CONTENT
