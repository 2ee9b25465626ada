"""Folders are listed as mmpretrain lists them, except that hidden folders are skipped."""

from __future__ import annotations

import pytest
from mmpretrain.datasets import CustomDataset

from mmmilan.datasets import ImageFolder
from mmmilan.datasets.decoding import EXTENSIONS
from mmmilan.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Names that sort differently with and without the slash, hidden files, a link, other files, an empty folder."""
    root = tmp_path / 'root'
    for name in (
        'a/2.jpg',
        'a/1.PNG',
        'a/deep/er/3.jpeg',
        'a-b/4.tif',
        'a/.hidden.jpg',
        'a/.dir/5.webp',
        'c/notes.txt',
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / 'linked').symlink_to(root / 'a-b')
    return root


@pytest.mark.parametrize('with_label', [False, True])
def test_as_mmpretrain(folder, with_label, log):
    ours = ImageFolder(str(folder), with_label=with_label, pipeline=[])
    theirs = CustomDataset(data_root=str(folder), with_label=with_label, extensions=EXTENSIONS, pipeline=[])
    infos = [[data.get_data_info(i) | dict(sample_idx=0) for i in range(len(data))] for data in (ours, theirs)]
    assert infos[0] == [info for info in infos[1] if '/.dir/' not in info['img_path']]
    assert len(ours) == 5 and ours.metainfo == theirs.metainfo
    assert ('folders without images: c.' in log.text) == with_label


def test_no_image(folder):
    with pytest.raises(InputError, match='root/c/? holds no image'):
        ImageFolder(str(folder / 'c'), pipeline=[])


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_a_list_of_images(tmp_path, encoding):
    """As people write it, in the encodings of Windows too."""
    path, options = tmp_path / 'train.txt', dict(data_root=str(tmp_path), ann_file='train.txt', pipeline=[])
    path.write_text('ü 1.jpg 4\r\n\r\nb/2.jpg\t0\r\n', encoding=encoding, newline='')
    data = ImageFolder(**options, with_label=True)
    found = [(info['img_path'], info['gt_label']) for info in map(data.get_data_info, range(len(data)))]
    assert found == [(f'{tmp_path}/ü 1.jpg', 4), (f'{tmp_path}/b/2.jpg', 0)]
    path.write_text('ü 1.jpg\nb/2.jpg', encoding=encoding)
    data = ImageFolder(**options)
    assert [data.get_data_info(i)['img_path'] for i in range(2)] == [f'{tmp_path}/ü 1.jpg', f'{tmp_path}/b/2.jpg']
    with pytest.raises(InputError, match=r"train.txt has the line 'ü 1.jpg'; write the path of an image, a space and "):
        ImageFolder(**options, with_label=True)
