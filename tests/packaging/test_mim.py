"""OpenMMLab's package manager, onedl-mim or openmim, where one of them is installed."""

from __future__ import annotations

import modelindex
import pytest

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
