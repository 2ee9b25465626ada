"""Images packed into an LMDB are the images of the folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmmilan.datasets import Draw, ImageFolder, LoadImage
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
