"""OpenMMLab's packages find our parts once mmmilan is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mmengine.config import Config
from yapf.yapflib import yapf_api

import mmmilan  # noqa: F401 - extends MMEngine
from helpers import FINE_TUNED, PRETRAINED, ROOT

IN_EITHER_ORDER = f"""
import importlib.util, os, sys
import torch, mmcv, mmengine.runner  # once for both processes

def check(first):
    dense = [name for name in ('mmdet', 'mmseg') if importlib.util.find_spec(name) and first == 'mmpretrain']
    if first == 'mmpretrain':
        apis = [importlib.import_module(f'{{name}}.apis') for name in dense]
        import mmpretrain
        assert 'milan_vit-large-p16_16xb256-amp-coslr-400e_in1k' not in mmpretrain.list_models()  # its hub is filled
    import mmmilan, mmpretrain
    from mmpretrain.apis.model import ModelHub
    assert '{PRETRAINED}' in mmpretrain.list_models('milan')
    assert '{FINE_TUNED}' in mmpretrain.list_models('vit*milan')
    assert 'milan_vit-large-p16_16xb256-amp-coslr-400e_in1k' in mmpretrain.list_models()
    assert 'resnet50_8xb32_in1k' in mmpretrain.list_models('resnet50')
    assert ModelHub.get('{PRETRAINED}').config.model.type == 'mmmilan.MILAN'
    for name in dense:
        apis = importlib.import_module(f'{{name}}.apis')
        inferencer = getattr(apis, dict(mmdet='DetInferencer', mmseg='MMSegInferencer')[name])
        for wanted in ('LoadImageFromFile', ('LoadImageFromFile', type)):
            assert inferencer._get_transform_idx(None, [dict(type='mmmilan.LoadImage')], wanted) == 0
    small = dict(arch=dict(embed_dims=48, num_layers=1, num_heads=3, feedforward_channels=96, _delete_=True))
    model = mmpretrain.get_model('{FINE_TUNED}', backbone=small, head=dict(in_channels=48))
    assert model._metainfo.config.filename.startswith({str(ROOT)!r}), model._metainfo.config.filename

for first in ('mmmilan', 'mmpretrain'):
    assert not {{'mmmilan', 'mmpretrain'}} & set(sys.modules)
    if os.fork() == 0:
        check(first)
        os._exit(0)
sys.exit(sum(os.wait()[1] for _ in range(2)) != 0)
"""


@pytest.mark.slow
def test_openmmlab_finds_our_parts():
    """In either order of import."""
    run = subprocess.run([sys.executable, '-c', IN_EITHER_ORDER], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr


def test_a_config_is_formatted_when_it_has_changed(monkeypatch):
    calls = []
    monkeypatch.setattr(yapf_api, 'FormatCode', lambda text, **kwargs: (calls.append(text) or text, True))
    config = Config(dict(model=dict(width=3), other=[1]))
    assert config.pretty_text == config.pretty_text == Config(config.to_dict()).pretty_text and len(calls) == 1
    config.model.width = 4
    assert 'width=4' in config.pretty_text and len(calls) == 2
    config.other.append(2)
    assert '2,' in config.pretty_text and len(calls) == 3
