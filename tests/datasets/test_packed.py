"""Images in an LMDB are those of the folder; captions in tar shards: indices, bad files, the order of reading."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from helpers import grey_png
from mmmilan.datasets import CaptionedShards, Draw, ImageFolder, LoadImage, ShardSampler
from mmmilan.datasets.image_folder import list_images
from mmmilan.datasets.packed import load_index, pack_images, pair_by_name
from mmmilan.errors import InputError


def build(folder: Path, with_label: bool, backend_args: dict | None = None) -> ImageFolder:
    load = dict(type='mmmilan.LoadRandomResizedCrop', scale=32, flip_prob=0.5, backend_args=backend_args)
    pipeline = [load, dict(type='PackInputs')]
    return ImageFolder(str(folder), with_label=with_label, backend_args=backend_args, pipeline=pipeline)


@pytest.mark.parametrize('with_label', [False, True])
def test_lmdb(image_folder, run_tool, tmp_path, with_label):
    """A packed folder gives the samples and labels of the folder."""
    pytest.importorskip('lmdb')
    database = tmp_path / 'images.lmdb'
    run_tool('pack_images.py', image_folder, database)
    backend_args = dict(backend='lmdb', db_path=str(database))
    packed, folder = build(database, with_label, backend_args), build(image_folder, with_label)
    assert len(packed) == len(folder) == 24
    assert packed.metainfo.get('classes') == folder.metainfo.get('classes')
    for i in range(24):
        sample, expected = packed[Draw(0, 0, i)], folder[Draw(0, 0, i)]
        assert (sample['inputs'] == expected['inputs']).all()
        if with_label:
            assert sample['data_samples'].gt_label == expected['data_samples'].gt_label
    info = packed.get_data_info(0)
    image = LoadImage(backend_args)(dict(img_path=info['img_path']))['img']
    assert np.array_equal(image, LoadImage()(dict(img_path=str(image_folder / info['img_path'])))['img'])
    with pytest.raises(InputError, match='The image nothing.jpg is missing'):
        LoadImage(backend_args)(dict(img_path='nothing.jpg'))


def test_an_image_in_no_folder_is_no_class_of_a_database(image_folder, tmp_path, log):
    pytest.importorskip('lmdb')
    root = Path(shutil.copytree(image_folder, tmp_path / 'images'))
    (root / 'stray.png').write_bytes(grey_png(1))
    pack_images(root, sorted(root.rglob('*.*')), tmp_path / 'images.lmdb')
    pack_images(root, [root / 'stray.png'], tmp_path / 'flat.lmdb')
    backend_args, flat = (dict(backend='lmdb', db_path=str(tmp_path / name)) for name in ('images.lmdb', 'flat.lmdb'))
    packed, folder = build(tmp_path, True, backend_args), build(root, True)
    assert len(packed) == len(folder) == 24 and packed.CLASSES == folder.CLASSES
    assert 'images.lmdb: 1 images in no folder of a class' in log.text
    assert len(build(tmp_path, False, backend_args)) == 25 and len(build(tmp_path, False, flat)) == 1
    with pytest.raises(InputError, match='flat.lmdb has no image in the folder of a class; pack folders'):
        build(tmp_path, True, flat)


def test_lmdb_refusals(image_folder, run_tool, tmp_path):
    pytest.importorskip('lmdb')
    with pytest.raises(InputError, match='none.lmdb does not exist; make it with tools/pack_images.py'):
        build(tmp_path, False, dict(backend='lmdb', db_path=str(tmp_path / 'none.lmdb')))
    with pytest.raises(SystemExit, match='nowhere does not exist'):
        run_tool('pack_images.py', tmp_path / 'nowhere', tmp_path / 'images.lmdb')
    folder = tmp_path / 'names'
    folder.mkdir()
    (folder / 'ä.jpg').write_bytes(b'x')
    with pytest.raises(SystemExit, match='The name ä.jpg is not ASCII'):
        run_tool('pack_images.py', folder, tmp_path / 'images.lmdb')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['names']  # nothing half done
    run_tool('pack_images.py', image_folder, tmp_path / 'images.lmdb')
    with pytest.raises(SystemExit, match='images.lmdb exists; remove it'):
        run_tool('pack_images.py', image_folder, tmp_path / 'images.lmdb')


@pytest.mark.parametrize('name', ['ä.png', 'x' * 300 + '/' + 'y' * 250 + '.png'])
def test_names_are_refused_before_an_image_is_read(tmp_path, name, monkeypatch):
    pytest.importorskip('lmdb')
    monkeypatch.setattr(Path, 'read_bytes', lambda path: pytest.fail(f'{path} was read'))
    with pytest.raises(InputError, match='is not ASCII, or longer than 511; rename it'):
        pack_images(tmp_path, [tmp_path / 'a.png', tmp_path / name], tmp_path / 'images.lmdb')


def test_an_image_that_cannot_be_read_is_not_packed(tmp_path):
    pytest.importorskip('lmdb')
    (tmp_path / 'a.png').write_bytes(grey_png(1))
    (tmp_path / 'b.png').mkdir()
    for name, reason in (('b.png', 'Is a directory'), ('c.png', 'No such file')):
        with pytest.raises(InputError, match=rf'The image \S*/{name} cannot be read \({reason}.*\); mend it, or move'):
            pack_images(tmp_path, [tmp_path / 'a.png', tmp_path / name], tmp_path / 'images.lmdb')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'b.png']  # nothing half done


LOAD = [dict(type='mmmilan.LoadImage')]


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two shards of 3 and 4 samples; the texts are in .txt and .json files, before and after the images."""
    folder = tmp_path / 'shards'
    first = {'x/000.txt': b'zero\nnull\n', 'x/000.png': grey_png(0), 'x/001.png': grey_png(1), 'x/001.txt': b'one'}
    first |= {'x/002.json': b'{"caption": ["two", " "], "url": ""}', 'x/002.png': grey_png(2), 'x/readme.md': b'?'}
    write_shard(folder / '00000.tar', first)
    second = {
        f'{i:03}.{e}': v for i in range(3, 7) for e, v in (('png', grey_png(i)), ('json', b'{"caption": "%d"}' % i))
    }
    write_shard(folder / '00001.tar', second)
    return folder


def test_shards(shards):
    dataset = CaptionedShards(str(shards), pipeline=LOAD)
    assert [int(sample['img'][0, 0, 0]) for sample in dataset] == list(range(7))
    assert [s['captions'] for s in dataset] == [['zero', 'null'], ['one'], ['two'], ['3'], ['4'], ['5'], ['6']]
    assert dataset.shard_sizes == [3, 4]


def test_a_shard_is_indexed_once_and_again_when_it_changes(shards, monkeypatch):
    shard = shards / '00001.tar'
    expected = load_index(shard)
    monkeypatch.setattr(tarfile, 'open', lambda *args: pytest.fail('read again'))
    assert load_index(shard) == expected and len(expected.samples) == 4
    monkeypatch.undo()
    moved = shards.rename(shards.with_name('moved'))  # with its index
    assert [path for path, _ in load_index(moved / '00001.tar').samples] == [
        p.replace('/shards/', '/moved/') for p, _ in expected.samples
    ]
    write_shard(moved / '00001.tar', {'a.png': grey_png(9), 'a.txt': b'new'})
    assert [texts for _, texts in load_index(moved / '00001.tar').samples] == [['new']]


def test_bad_shards(shards, log, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='holds no .tar file'):
        CaptionedShards(str(tmp_path / 'empty'))
    write_shard(shards / '00002.tar', {'7.png': grey_png(7), '8.png': b'broken', '8.txt': b'eight'})
    dataset = CaptionedShards(str(shards), pipeline=LOAD)
    assert dataset.shard_sizes == [3, 4, 1]
    assert int(dataset[7]['img'][0, 0, 0]) < 7
    assert 'Left out of the shards in' in log.text and '1 images without caption' in log.text
    assert '00002.tar/8.png@' in log.text and 'does not decode' in log.text
    with pytest.raises(InputError, match='00002.tar/7.png@.* has no caption'):
        CaptionedShards(str(shards), on_corrupt='raise')
    content = (shards / '00001.tar').read_bytes()
    (shards / '00001.tar').write_bytes(content[:3000])
    with pytest.raises(InputError, match='00001.tar is damaged'):
        CaptionedShards(str(shards))


def test_shard_sampler_reads_one_shard_after_the_other(shards):
    dataset = CaptionedShards(str(shards))
    sampler = ShardSampler(dataset, seed=3)
    orders = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        draws = list(sampler)
        assert draws == list(sampler) and {(draw.seed, draw.crop) for draw in draws} == {(3, epoch)}
        orders.append([draw.index for draw in draws])
    for order in orders:
        assert sorted(order) == list(range(7))
        in_second = [index >= 3 for index in order]
        assert sum(a != b for a, b in zip(in_second[:-1], in_second[1:], strict=True)) == 1
    assert len({tuple(order) for order in orders}) == 8
    assert len({order[0] >= 3 for order in orders}) == 2


def test_processes_share_the_shards(shards, monkeypatch):
    dataset = CaptionedShards(str(shards))
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda rank=rank: (rank, 2))
        parts.append([draw.index for draw in ShardSampler(dataset, seed=0)])
    monkeypatch.undo()
    whole = [draw.index for draw in ShardSampler(dataset, seed=0)]
    assert parts == [whole[::2], whole[1::2] + whole[:1]]


def test_names_with_several_dots(tmp_path, log):
    names = ['2021-05-06 10.11.12', '2021-05-06 10.11.13', './a.b/c.d']
    files = {f'{name}.{e}': v for name in names for e, v in (('jpg', grey_png(1)), ('txt', name.encode()))}
    files |= {'._x.jpg': b'', '__MACOSX/y.jpg': b'', '3.cls': b'1', 'orphan.txt': b'text', '7.8.txt': b'\xff\xff'}
    write_shard(tmp_path / 'x.tar', files)
    for _ in range(2):  # the second time from the stored index
        dataset = CaptionedShards(str(tmp_path), pipeline=[])
        assert [dataset.get_data_info(i)['captions'] for i in range(3)] == [[name] for name in names]
    line = '2 hidden, 1 .cls, 1 .txt, 1 .txt without image.'
    assert log.text.count(line) == 2


@pytest.mark.parametrize(
    'images, texts, expected',
    [
        ('7.jpg', '7.txt 7.en.txt', '7.txt 7.en.txt'),
        ('7.image.jpg', '7.caption.txt', '7.caption.txt'),
        ('7.left.jpg 7.right.jpg', '7.txt', '7.txt 7.txt'),
        ('7.jpg 7.copy.jpg', '7.txt 7.copy.txt', '7.txt 7.copy.txt'),
        ('7.8.jpg', '7.9.txt', ''),
        ('a/7.jpg', 'b/7.txt', ''),
    ],
)
def test_pairs(images, texts, expected):
    found = pair_by_name(images.split(), texts.split())
    assert [name for names in found.values() for name in names] == expected.split()


@pytest.mark.parametrize('offset, size', [(-5, 10), (-512, 600), (0, -1), (10**9, 1), (1.5, 2), (True, 1)])
def test_a_stored_index_out_of_the_tar(shards, offset, size):
    good = load_index(shards / '00000.tar')
    path = shards / '00000.tar.index.json'
    index = json.loads(path.read_text())
    index['samples'][0][1:3] = offset, size
    path.write_text(json.dumps(index))
    assert load_index(shards / '00000.tar') == good
    path.write_text('{"stamp": ' + '[' * 100_000)
    assert load_index(shards / '00000.tar') == good


@pytest.mark.parametrize('name', ['a.TAR', 'folder.tar/b.Tar'])
def test_the_name_of_a_shard_in_capitals(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_shard(tmp_path / name, {'d.tar/1.png': grey_png(7)})
    [path] = list_images(tmp_path)
    assert (LoadImage()(dict(img_path=path))['img'] == 7).all()
