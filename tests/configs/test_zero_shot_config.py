"""The zero-shot config: the pretraining model, ImageNet's labelled validation images, CLIP's own prompts."""

from __future__ import annotations

from mmengine.config import Config

from helpers import ROOT, own_settings, restated

PATH = ROOT / 'configs/milan/zero_shot/milan_vit-base-p16_zero-shot_in1k.py'


def test_is_the_pretraining_config_with_another_test():
    own = own_settings(PATH)
    cfg, base = Config.fromfile(PATH), Config.fromfile(PATH.parent / own.pop('_base_'))
    assert list(restated(own, base.to_dict())) == []
    assert cfg.model == base.model and cfg.train_dataloader == base.train_dataloader
    dataset = cfg.test_dataloader.dataset
    assert (dataset.type, dataset.split, dataset.pipeline) == (
        'mmpretrain.ImageNet', 'val', base.test_dataloader.dataset.pipeline,
    )  # fmt: skip
    assert cfg.test_cfg == dict(type='mmmilan.ZeroShotLoop', templates='openai', class_names='imagenet')
    assert str(PATH.relative_to(ROOT)) in PATH.read_text()
