"""Where commands may write, and what is left of what they did not finish."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mmmilan.errors import InputError
from mmmilan.files import (
    atomic_folder,
    atomic_write,
    check_output,
    check_output_folder,
    extension,
    make_folder,
    remove_leftovers,
    short_name,
    write_text,
)
from processes import exit_code


def contents(folder: Path) -> dict[str, bytes | None]:
    """All below a folder, hidden files too."""
    paths = sorted(folder.rglob('*'))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


# -- an output is never an input


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('way', ['the same', 'relative', 'dots', 'symlink', 'hardlink', 'linked folder'])
def test_an_output_that_is_an_input(tmp_path, monkeypatch, way, overwrite):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / 'runs/m.pth'
    source.parent.mkdir()
    source.write_bytes(b'weights')
    link = tmp_path / 'link.pth'
    if way == 'symlink':
        link.symlink_to(source)
    elif way == 'hardlink':
        os.link(source, link)
    elif way == 'linked folder':
        (tmp_path / 'other').symlink_to(source.parent)
    path = dict(relative='runs/m.pth', dots='runs/../runs/m.pth') | {'the same': source, 'linked folder': 'other/m.pth'}
    with pytest.raises(InputError, match='is read by the same command; choose another name'):
        check_output(path.get(way, link), ['no such model', source], overwrite=overwrite)
    assert source.read_bytes() == b'weights'


def test_an_existing_file_is_replaced_only_on_request(tmp_path):
    path = tmp_path / 'page.html'
    assert check_output(path) == path
    path.write_text('a letter')
    with pytest.raises(InputError, match=r'page.html exists; choose another name, or add --overwrite'):
        check_output(path)
    with pytest.raises(InputError, match='exists'):
        check_output(path, mark='Written by')
    assert check_output(path, overwrite=True) == path
    path.write_text('<p>Written by us')
    assert check_output(path, mark='Written by') == path
    (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(InputError, match='exists'):
        check_output(tmp_path / 'dangling')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('folder', 'is a folder'),
        ('.', 'is a folder'),
        ('', 'is a folder'),
        ('pipe', 'is a device or a pipe'),
        ('/dev/null', 'is a device or a pipe'),
        ('/dev/stdout/x', 'Nothing can be written|cannot be written'),
        ('file/x.html', 'cannot be written .Not a directory'),
        ('file/deep/x.html', 'cannot be written .Not a directory'),
        ('/proc/x/y.html', 'Nothing can be written in /proc/x'),
        ('/sys/x.html', 'Nothing can be written in /sys'),
        ('x' * 300, 'File name too long'),
        ('a\0b', 'null'),
    ],
)
@pytest.mark.parametrize('overwrite', [False, True])
def test_places_where_no_file_can_be(tmp_path, monkeypatch, name, message, overwrite):
    monkeypatch.chdir(tmp_path)
    Path('folder').mkdir()
    Path('file').write_text('kept')
    os.mkfifo('pipe')
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message) as error:
        check_output(name, overwrite=overwrite)
    assert '\n' not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before and Path('file').read_text() == 'kept'


def test_endings(tmp_path):
    with pytest.raises(InputError, match=r'photo.jpg does not end in .pth or .safetensors'):
        check_output(tmp_path / 'photo.jpg', endings=('.pth', '.safetensors'), overwrite=True)
    assert check_output(tmp_path / 'WEIGHTS.PTH', endings=('.pth', '.safetensors')) == tmp_path / 'WEIGHTS.PTH'


@pytest.mark.parametrize(
    ('path', 'expected'),
    [('a/B.TAR.Gz', '.gz'), ('a.b/c', ''), ('a/.npz', ''), (Path('A.NPZ'), '.npz'), ('tar://a.tar/É.JPG', '.jpg')],
)
def test_extension(path, expected):
    assert extension(path) == expected


def test_checks_leave_nothing(tmp_path):
    check_output(tmp_path / 'a/b/c.html')
    check_output_folder(tmp_path / 'd/e', ['f.png'])
    assert contents(tmp_path) == {}


# -- folders


@pytest.mark.parametrize('out', ['photos', 'photos/figures', 'photos/a/b', 'link', 'photos/../photos/x'])
def test_pictures_do_not_go_among_the_images_that_are_read(tmp_path, out):
    (tmp_path / 'photos/a').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'photos')
    with pytest.raises(InputError, match='whose images are read: the pictures would be among them'):
        check_output_folder(tmp_path / out, ['figure2.png'], [tmp_path / 'photos'], pictures=True, overwrite=True)
    check_output_folder(tmp_path / out, ['features.npz'], [tmp_path / 'photos'])
    check_output_folder(tmp_path / 'photos-figures', ['figure2.png'], [tmp_path / 'photos'], pictures=True)


@pytest.mark.parametrize('name', ['../x', 'a/b', '/etc/x', '..', '.', ''])
def test_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(InputError, match='does not stay in the folder of the output'):
        check_output_folder(tmp_path, [name], overwrite=True)


def test_a_folder_of_another(tmp_path):
    (tmp_path / 'index.html').write_text('a homepage')
    with pytest.raises(InputError, match='index.html exists'):
        check_output_folder(tmp_path, ['figure2.png', 'index.html'])
    assert check_output_folder(tmp_path, ['figure2.png', 'index.html'], overwrite=True) == tmp_path
    (tmp_path / 'file').write_text('kept')
    for write in (check_output_folder, make_folder):
        with pytest.raises(InputError, match='file'):
            write(tmp_path / 'file')


# -- whole or not at all


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_text(tmp_path / 'new/text', 'first')
    full = pytest.raises(InputError, match='text was not written .*No space left.*; free space')
    with full, atomic_write(tmp_path / 'new/text') as temporary:
        Path(temporary).write_text('half')
        raise OSError(28, 'No space left on device')
    with pytest.raises(InputError, match='set was not written'), atomic_folder(tmp_path / 'set') as folder:
        (folder / 'half').write_text('half')
        raise OSError(28, 'No space left on device')
    assert contents(tmp_path) == {'new': None, 'new/text': b'first'}
    with atomic_folder(tmp_path / 'set') as folder:
        (folder / 'whole').write_text('whole')
    assert contents(tmp_path / 'set') == {'whole': b'whole'}
    assert (tmp_path / 'set').stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def write_and_die(folder: Path) -> None:
    with atomic_write(folder / 'a.pth') as temporary, atomic_folder(folder / 'set') as unfinished:
        Path(temporary).write_text('half')
        (unfinished / 'half').write_text('half')
        os.kill(os.getpid(), signal.SIGKILL)


def test_only_a_full_disk_is_called_one(tmp_path):
    """What fails while a file is made is no fault of the disk."""
    for message, kind in (('CUDA out of memory', RuntimeError), ('unexpected pos 576 vs 534', InputError)):
        with pytest.raises(kind, match=message), atomic_write(tmp_path / 'a'):
            raise RuntimeError(message)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """Those of processes that still write are kept, and so is every other hidden file."""
    (tmp_path / '.a.pth.mine').write_text('kept')
    assert exit_code(write_and_die, tmp_path) == -signal.SIGKILL
    assert len(contents(tmp_path)) == 4
    with atomic_write(tmp_path / 'b.pth') as temporary:
        Path(temporary).write_text('whole')
        write_text(tmp_path / 'other', 'whole')
        assert exit_code(remove_leftovers, tmp_path) == 0
    assert contents(tmp_path) == {'.a.pth.mine': b'kept', 'b.pth': b'whole', 'other': b'whole'}


LONG = ['x' * 250, 'ä' * 125, '猫' * 83, '\N{CAT FACE}' * 62, os.fsdecode(b'\xff' * 250)]


@pytest.mark.parametrize('name', LONG, ids=['1', '2', '3', '4', 'not utf-8'])
def test_a_long_name(tmp_path, name):
    write_text(tmp_path / name, 'whole')
    with atomic_folder(tmp_path / f'{name}-'):
        pass
    assert contents(tmp_path) == {name: b'whole', f'{name}-': None}


@pytest.mark.parametrize('name', LONG, ids=['1', '2', '3', '4', 'not utf-8'])
def test_short_names(name):
    short = short_name(name)
    assert 230 < len(os.fsencode(short)) <= 240 and name.startswith(short[:-9]) and short_name(short) == short
    assert short != short_name(f'{name}2') != short_name(f'{name}1')
    assert short_name(name[:40]) == name[:40]
