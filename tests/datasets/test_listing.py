"""The walker: which files of a folder are images, and what is said about the others."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmmilan.datasets import ImageFolder, LoadImage
from mmmilan.datasets.image_folder import list_images
from mmmilan.datasets.listing import Names, list_folder, listed_once
from mmmilan.errors import InputError


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_what_other_tools_leave_is_skipped(tmp_path, log):
    root = make(tmp_path / 'photos', 'a.jpg', 'b/c.JPG', 'd e/ü.Png')
    make(root, '._a.jpg', '.thumbs/a.jpg', '__MACOSX/._a.jpg', '__MACOSX/a.jpg', 'b/@eaDir/c.JPG/SYNO_THUMB.jpg')
    make(root, '~$a.jpg', 'RECYCLER/a.jpg', '@tmp/a.jpg', 'b/_gsdata_/c.jpg')
    make(root, 'Thumbs.db', '.DS_Store', 'b/desktop.ini', '$RECYCLE.BIN/x.png', 'b/.ipynb_checkpoints/c.jpg')
    make(root, 'film.MP4', 'b/film.mp4', 'README', 'x.tar.index.json')
    names = ['a.jpg', 'b/c.JPG', 'd e/ü.Png']
    assert list_folder(root).files == names
    assert list_folder(root).folders == list_folder(root).top_folders == ['b', 'd e']
    assert list_images(root) == [str(root / name) for name in names]
    data = ImageFolder(str(root), pipeline=[])
    assert [data.get_data_info(i)['img_path'] for i in range(len(data))] == list_images(root)
    line = f'Left out of {root}: 8 hidden folders, 2 .mp4, 2 hidden images, 1 without extension.'
    assert line in log.messages


def test_links_are_followed_and_loops_cut(tmp_path, log):
    root = make(tmp_path / 'photos', 'a/1.jpg', 'a/b/2.jpg')
    make(tmp_path / 'elsewhere', '3.jpg', 'deep/4.jpg')
    (root / 'link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere/back').symlink_to(root)
    (root / 'a/b/up').symlink_to('..')
    (root / 'a/self').symlink_to('self')
    (root / 'gone.jpg').symlink_to('nowhere.jpg')
    (root / 'file.jpg').symlink_to(root / 'a/1.jpg')
    assert list_folder(root).files == ['a/1.jpg', 'a/b/2.jpg', 'file.jpg', 'link/3.jpg', 'link/deep/4.jpg']
    assert {'3.jpg', 'deep/4.jpg', 'back/a/1.jpg'} < set(list_folder(root / 'link').files)
    assert '2 broken links' in log.text
    (tmp_path / 'whole').symlink_to(root)
    assert list_folder(tmp_path / 'whole').files == list_folder(root).files


def test_a_folder_is_listed_once(tmp_path, monkeypatch, log):
    root = make(tmp_path / 'photos', 'train/a/1.jpg', 'train/b/2.jpg', 'val/3.jpg', 'val/x.mp4', 'val/.hidden/4.jpg')
    (root / 'train/empty').mkdir()
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, 'scandir', lambda path: seen.append(str(path)) or scandir(path))
    with listed_once():
        whole = list_folder(root)
        assert list_folder(f'{root}/train/').files == ['a/1.jpg', 'b/2.jpg']
        assert list_folder(root / 'train').folders == ['a', 'b', 'empty']
        assert list_folder(root / 'train/b').files == ['2.jpg']
        assert list_folder(root / 'val/.hidden').files == ['4.jpg']
        make(root, 'val/5.jpg')
        assert list_folder(root) == whole
        assert len(seen) == len(set(seen)) == 7
        with ThreadPoolExecutor() as executor:  # another call of the program
            assert executor.submit(list_folder, root / 'val').result().files == ['3.jpg', '5.jpg']
    assert list_folder(root / 'val').files == ['3.jpg', '5.jpg']
    assert log.text.count('1 .mp4') == 3


@pytest.mark.parametrize('name', [b'caf\xe9.jpg', b'\x1b[31mred.jpg', b'two\nlines.jpg'])
def test_names_that_are_no_text(tmp_path, name, log):
    """Such a file is read, and its name does not break the log."""
    root = os.fsencode(tmp_path)
    for each in (name, b'a.jpg'):
        with open(os.path.join(root, each), 'wb') as file:
            file.write(b'no image')
    data = ImageFolder(str(tmp_path), pipeline=[LoadImage()])
    assert [os.fsencode(path) for path in list_images(tmp_path)] == sorted(
        os.path.join(root, n) for n in (name, b'a.jpg')
    )
    with pytest.raises(InputError) as error:
        data[0]
    assert log.text.count('does not decode') == 100
    log.text.encode()
    str(error.value).encode()


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch, log):
    root, scandir = make(tmp_path / 'photos', 'a/1.jpg', 'secret/2.jpg'), os.scandir

    def refuse(path):
        if str(path).endswith('secret'):
            raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    assert list_folder(root).files == ['a/1.jpg']
    assert f'{root}/secret cannot be read (Permission denied)' in log.text


@pytest.mark.parametrize('names', [[], ['a.jpg'], ['ü/\udcff.jpg', 'x y\n.png', '\ud800', 'b' * 300]])
def test_names_in_one_array(names):
    packed = Names(names)
    assert packed == names and len(packed) == len(names) and packed[1:] == names[1:]
    assert [packed[i] for i in range(-len(names), len(names))] == names * 2
    assert list(packed.within('/top')) == [f'/top/{name}' for name in names]
    for index in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            packed[index]
