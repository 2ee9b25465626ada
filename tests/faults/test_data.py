"""Spoilt images, captions and shards are skipped or refused by name, without a crash or a hang."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers import read_scalars, rest_slow
from mmmilan.datasets import (
    CaptionedImages,
    CaptionedShards,
    CorruptImageError,
    ImageFolder,
    LoadImage,
    LoadRandomResizedCrop,
)
from mmmilan.datasets.captions import read_table
from mmmilan.datasets.decoding import ORIENTATION, decode
from mmmilan.datasets.image_folder import list_images
from mmmilan.datasets.labelled import read_labelled
from mmmilan.datasets.listing import list_folder
from mmmilan.datasets.packed import list_lmdb, pack_images, read_index
from mmmilan.datasets.splits import list_labelled_images
from mmmilan.errors import InputError
from mutations import spoil_bytes


def photo(extension: str, orientation: int = 6, **options) -> bytes:
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 255, (9, 11, 3), dtype=np.uint8), (66, 54), interpolation=cv2.INTER_CUBIC)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(file, extension, **({'exif': exif} if extension != 'BMP' else {}), **options)
    return file.getvalue()


@pytest.mark.parametrize('extension', rest_slow(['JPEG', 'PNG', 'WEBP', 'TIFF', 'BMP'], 'JPEG', 'PNG'))
@pytest.mark.parametrize('transform', [LoadImage(), LoadRandomResizedCrop(16)], ids=['whole', 'crop'])
def test_spoilt_images(tmp_path, extension, transform, capfd):
    content, rng, path = photo(extension), random.Random(0), tmp_path / 'photo'
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow's, of what it finds in the file
        for _ in range(100):
            path.write_bytes(spoil_bytes(content, rng))
            try:
                assert transform(dict(img_path=str(path)))['img'].dtype == np.uint8
            except InputError as error:
                assert str(path) in str(error) and '\n' not in str(error)
                refused += 1
    assert refused > 5


@pytest.mark.parametrize('extension', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(10))
def test_exif_turns_every_format(extension, orientation):
    content = photo(extension, orientation)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    assert (decode(content, 'photo')[..., ::-1] == expected).all()


def test_a_large_image_loads_and_a_limit_is_an_option(tmp_path):
    """Pillow would refuse it as a decompression bomb."""
    path = tmp_path / 'large.jpg'
    cv2.imwrite(str(path), np.zeros((13000, 14000), np.uint8))
    assert LoadRandomResizedCrop(16)(dict(img_path=str(path)))['ori_shape'] == (13000, 14000)
    for transform in (LoadImage(max_pixels=10**8), LoadRandomResizedCrop(16, max_pixels=10**8)):
        with pytest.raises(CorruptImageError, match=r'large\.jpg has 14000 x 13000 pixels; make it smaller'):
            transform(dict(img_path=str(path)))


def test_a_bomb_takes_no_memory(tmp_path):
    header = b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR' + (60000).to_bytes(4, 'big') * 2 + b'\x08\x02\0\0\0'
    (tmp_path / 'bomb.png').write_bytes(header + bytes(100))
    with pytest.raises(CorruptImageError, match=r'bomb\.png'):
        LoadImage()(dict(img_path=str(tmp_path / 'bomb.png')))


def test_special_files(tmp_path):
    """Reading a pipe would hang; a sparse file of a terabyte would fill the memory."""
    tmp_path = tmp_path / 'alone' / 'images'  # where '..' holds nothing else
    tmp_path.mkdir(parents=True)
    os.mkfifo(tmp_path / 'pipe.jpg')
    (tmp_path / 'loop.jpg').symlink_to('loop.jpg')
    with open(tmp_path / 'hole.jpg', 'wb') as file:
        file.truncate(1 << 40)
    (tmp_path / 'folder.jpg').mkdir()
    for name in ('pipe', 'loop', 'hole', 'folder'):
        with pytest.raises(CorruptImageError, match=f'{name}.jpg'):
            LoadImage()(dict(img_path=str(tmp_path / f'{name}.jpg')))
    (tmp_path / 'up').symlink_to('..')
    (tmp_path / 'here').symlink_to('.')
    (tmp_path / 'a.jpg').write_bytes(photo('JPEG'))
    assert list_folder(tmp_path).files == ['a.jpg', 'hole.jpg']


def test_an_image_that_is_deleted_while_training(tmp_path):
    for name in 'abc':
        (tmp_path / f'{name}.jpg').write_bytes(photo('JPEG'))
    dataset = ImageFolder(str(tmp_path), pipeline=[LoadImage()])
    (tmp_path / 'b.jpg').unlink()
    assert dataset[1]['img_path'] != str(tmp_path / 'b.jpg')
    assert dataset.num_corrupt >= 1


@pytest.mark.parametrize('size', [(1, 1), (1, 50), (50, 1), (2, 2)])
@pytest.mark.parametrize('extension', ['png', 'jpg'])
def test_a_tiny_image_gives_numbers(tmp_path, size, extension):
    path = str(tmp_path / f'tiny.{extension}')
    cv2.imwrite(path, np.full((*size, 3), 77, np.uint8))
    image = LoadRandomResizedCrop(32)(dict(img_path=path))['img']
    assert image.shape == (32, 32, 3) and (image == 77).all()


def test_a_folder_of_single_pixels_trains(tiny_config, run_tool, tmp_path):
    for grey in range(0, 256, 32):
        cv2.imwrite(str(tmp_path / f'{grey}.png'), np.full((1, 1, 3), grey, np.uint8))
    loader = dict(num_workers=0, dataset=dict(data_root=str(tmp_path)))
    run_tool('train.py', tiny_config(dict(train_dataloader=loader)))
    assert np.isfinite([line['loss'] for line in read_scalars(tmp_path / 'work')]).all()


# -- captions


@pytest.fixture
def captioned(tmp_path):
    """Three images and a function that reads them with a table of captions."""
    for name in 'abc':
        (tmp_path / f'{name}.jpg').write_bytes(photo('JPEG'))

    def read(content: bytes, name: str = 'captions.csv') -> dict[str, list[str]]:
        (tmp_path / name).write_bytes(content)
        dataset = CaptionedImages(str(tmp_path), str(tmp_path / name), pipeline=[])
        return {
            Path(info['img_path']).name: info['captions'] for info in map(dataset.get_data_info, range(len(dataset)))
        }

    return read


TABLE = 'image,caption\na.jpg,ein Käfer\nb.jpg,"a cat, asleep"\nc.jpg,a dog\n'


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_encodings(captioned, encoding):
    expected = {'a.jpg': ['ein Käfer'], 'b.jpg': ['a cat, asleep'], 'c.jpg': ['a dog']}
    assert captioned(TABLE.encode(encoding)) == expected


@pytest.mark.parametrize(
    'content, message',
    [
        (TABLE.encode('latin-1'), r'captions\.csv is not in UTF-8 \(byte \d+: .*\); save it as UTF-8'),
        (TABLE.replace('asleep"', 'asleep').encode(), r'captions\.csv, line 3: .*; correct the quotation marks'),
        (
            TABLE.replace('a dog', 'x' * 200_000).encode(),
            r'line 4: field larger than .*; close its quotation marks, or shorten it',
        ),
        (b'image|caption\na.jpg|x\n', 'lacks a column named image or caption; .* with a comma, semicolon or tab'),
        (
            b'image,caption\nb.jpg,a dog\na.jpg,a cat, on a mat\n',
            'line 3 has 3 cells where the first row has 2; put captions with commas in quotation marks',
        ),
        (b'caption;image\n"a; b";a.jpg\na cat; asleep;b.jpg\n', 'line 3 has 3 cells .* with semicolons in'),
        (b'image\tcaption\na.jpg\ta cat\ton a mat\n', 'line 2 has 3 cells .* with tabs in quotation marks'),
        (b'image,caption\na.jpg,"two\nlines"\nb.jpg,a dog, asleep\n', 'line 4 has 3 cells'),
        (b'', 'lacks a column named image or caption'),
    ],
)
def test_tables_that_cannot_be_read(captioned, content, message):
    with pytest.raises(InputError, match=message):
        captioned(content)


@pytest.mark.parametrize(
    ('content', 'name'),
    [
        (TABLE, 'captions.CSV'),
        (TABLE.replace('image,caption', ' Image , CAPTION '), 'captions.csv'),
        (TABLE.replace(',', ', ').replace('  ', ' '), 'captions.csv'),
        (TABLE.replace('Käfer', 'Käfer,'), 'captions.csv'),
        (TABLE.replace(',', ';').replace('cat;', 'cat,'), 'captions.csv'),
        (TABLE.replace(',', '\t').replace('cat\t', 'cat,'), 'captions.TSV'),
        (TABLE.replace(',', '\t').replace('cat\t', 'cat,'), 'captions.csv'),
        (TABLE.replace('\n', '\r\n'), 'captions.csv'),
        (TABLE.replace('\n', '\r'), 'captions.csv'),
        (TABLE.replace('\n', '\n\n'), 'captions.csv'),
    ],
)
def test_tables_as_tools_write_them(captioned, content, name):
    expected = {'a.jpg': ['ein Käfer'], 'b.jpg': ['a cat, asleep'], 'c.jpg': ['a dog']}
    assert captioned(content.encode(), name) == expected


def test_two_spellings_of_a_path_are_one_image(captioned):
    assert captioned(b'image,caption\n./a.jpg,one\na.jpg,two\n.//a.jpg,three\n') == {'a.jpg': ['one', 'two', 'three']}


def test_captions_that_are_no_text_are_skipped(captioned):
    images = [dict(id=number, file_name=f'{name}.jpg') for number, name in enumerate('abc')]
    rows = [dict(image_id=0, caption='a cat'), dict(image_id=1, caption=7), dict(image_id=2, caption=['x'])]
    content = json.dumps(dict(images=images, annotations=rows)).encode()
    assert captioned(content, 'captions.json') == {'a.jpg': ['a cat']}


def test_spoilt_tables(tmp_path):
    rng, path = random.Random(0), tmp_path / 'captions.csv'
    for _ in range(100):
        path.write_bytes(spoil_bytes(TABLE.encode(), rng))
        try:
            list(read_table(path))
        except InputError as error:
            assert '\n' not in str(error)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        for number in range(3):
            add(tar, f'{number}.jpg', photo('JPEG'))
            add(tar, f'{number}.txt', b'\xff\xff' if number == 1 else b'a photo')
    return tmp_path


def test_one_bad_text_and_a_folder_named_tar(shards):
    (shards / 'folder.tar').mkdir()
    assert len(CaptionedShards(str(shards), pipeline=[])) == 2


@pytest.mark.parametrize('content', [b'', b'{"stamp": [1', b'[]', b'{"stamp": null}', b'\xff', b'{"samples": [[1]]}'])
def test_an_index_that_is_damaged_is_made_again(shards, content):
    first = CaptionedShards(str(shards), pipeline=[])
    (shards / 'x.tar.index.json').write_bytes(content)
    again = CaptionedShards(str(shards), pipeline=[])
    assert [again.get_data_info(i) for i in range(2)] == [first.get_data_info(i) for i in range(2)]


def test_two_members_of_a_name(tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        for content in (b'', photo('JPEG')):
            add(tar, 'a.jpg', content)
    [(name, _, size, _)], unused = read_index(tmp_path / 'x.tar')  # as unpacking it, which keeps the last
    assert (name, size, unused) == ('a.jpg', len(photo('JPEG')), {'of the same name': 1})


def packed(ending: str) -> bytes:
    """An archive of one image, as it is named."""
    file = io.BytesIO()
    if ending.endswith('zip'):
        with zipfile.ZipFile(file, 'w') as archive:
            archive.writestr('a.jpg', photo('JPEG'))
        return file.getvalue()
    kind = {'gz': 'gz', 'tgz': 'gz', 'bz2': 'bz2', 'tbz2': 'bz2', 'xz': 'xz', 'txz': 'xz', 'TGZ': 'gz'}
    with tarfile.open(fileobj=file, mode=f'w:{kind[ending.rpartition(".")[2]]}') as tar:
        add(tar, 'a.jpg', photo('JPEG'))
    return file.getvalue()


@pytest.mark.parametrize(
    ('name', 'ending'),
    [(f'x.{each}', each) for each in ('zip', 'tar.gz', 'tgz', 'tar.bz2', 'tbz2', 'tar.xz', 'txz')]
    + [('x.TGZ', 'TGZ'), ('x.tar', 'tar.gz'), ('x.tar', 'zip'), ('x.TAR', 'tar.xz'), ('x', 'tgz')],
)
def test_compressed_archives(tmp_path, name, ending):
    (tmp_path / name).write_bytes(packed(ending))
    path = str(tmp_path / name)
    for read in (list_images, lambda path: ImageFolder(path, pipeline=[]), read_labelled, list_labelled_images):
        with pytest.raises(InputError, match=rf'{name} is compressed, .*; unpack it and give the folder'):
            read(path)


def test_spoilt_shards(shards):
    content, rng = (shards / 'x.tar').read_bytes(), random.Random(0)
    for _ in range(50):
        (shards / 'x.tar').write_bytes(spoil_bytes(content, rng))
        try:
            for name, offset, size, captions in read_index(shards / 'x.tar')[0]:
                assert all(isinstance(caption, str) for caption in captions)
                LoadImage()(dict(img_path=f'tar://{shards}/x.tar/{name}@{offset}+{size}'))
        except InputError as error:
            assert '\n' not in str(error)


def test_a_database_that_is_cut_off(tmp_path):
    pytest.importorskip('lmdb')
    (tmp_path / 'images').mkdir()
    paths = [tmp_path / 'images' / f'{number}.jpg' for number in range(20)]
    for path in paths:
        path.write_bytes(photo('JPEG'))
    pack_images(tmp_path / 'images', paths, tmp_path / 'db')
    assert len(list_lmdb(str(tmp_path / 'db'))) == 20
    size = (tmp_path / 'db/data.mdb').stat().st_size
    for left in (size // 2, 8192, 4096, 100, 0):
        os.truncate(tmp_path / 'db/data.mdb', left)
        with pytest.raises(InputError, match='The database .*(incomplete|cannot be read)'):
            list_lmdb(str(tmp_path / 'db'))
