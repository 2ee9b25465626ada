"""OpenMMLab's package manager, onedl-mim or openmim, where one of them is installed."""

from __future__ import annotations

from pathlib import Path

import modelindex
import pytest
from mmengine.config import Config

from helpers import PRETRAINED, ROOT
from mmmilan.checkpoints.zoo import zoo_models


def test_mim_reads_the_model_index():
    """As ``mim search`` and ``mim download`` do: names, weights, configs, sizes and scores."""
    search = pytest.importorskip('mim.commands.search')
    table = search.convert2df(modelindex.load(str(ROOT / 'model-index.yml')))
    assert set(table.index) == set(zoo_models())
    assert table.loc[PRETRAINED, 'weight'] == zoo_models()[PRETRAINED].weights
    assert all((ROOT / path).is_file() for path in table['config'])
    assert (table['flops'] > 1e10).all() and (table['parameters'] > 8e7).all()
    row = table.loc['mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco']
    assert row['coco/box_ap'] == 52.6 and row['coco/mask_ap'] == 45.5


def test_mim_downloads_what_is_published(tmp_path, monkeypatch):
    """The weights, and a config that is the package's."""
    download = pytest.importorskip('mim.commands.download')
    monkeypatch.setattr(download, 'get_installed_path', lambda package: str(ROOT))
    monkeypatch.setattr('mim.commands.search.get_installed_path', lambda package: str(ROOT))
    monkeypatch.setattr(download, 'download_from_file', lambda url, path, **_: Path(path).write_text(url))
    published = {name: model for name, model in zoo_models().items() if model.weights}
    files = download.download('mmmilan', [*published], str(tmp_path))
    assert [(tmp_path / file).read_text() for file in files] == [model.weights for model in published.values()]
    for name, model in published.items():
        assert Config.fromfile(tmp_path / f'{name}.py').to_dict() == Config.fromfile(model.config).to_dict()
