"""The example teacher of docs/teachers.md and its test run as printed there."""

from __future__ import annotations

import re

import open_clip
import timm
import torchvision
from torchvision.models import VisionTransformer

from helpers import ROOT
from mmmilan.registry import MODELS

TEXT = (ROOT / 'docs/teachers.md').read_text()


def test_own_teacher(monkeypatch):
    """With two of torchvision's twelve blocks."""
    vit = VisionTransformer(224, 16, num_layers=2, num_heads=12, hidden_dim=768, mlp_dim=3072)
    monkeypatch.setattr(torchvision.models, 'get_model', lambda *args, **kwargs: vit)
    blocks = re.findall(r'```python\n(# (?:test_)?my_teacher.py\n.*?)```', TEXT, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    try:
        for block in blocks:
            exec(block, names)
        names['test_own_teacher']()
    finally:
        MODELS.module_dict.pop('TorchvisionTeacher', None)


def test_every_name_has_weights():
    for model, tag in re.findall(r"OpenCLIPTeacher\('(.*?)', '(.*?)'\)", TEXT):
        assert tag in open_clip.list_pretrained_tags_by_model(model), model
    names = re.findall(r"TimmTeacher\('(.*?)'", TEXT) + re.findall(r'`(vit_[^`*]*\..*?)`', TEXT)
    assert len(names) > 5 and set(names) <= set(timm.list_models('vit*', pretrained=True))
