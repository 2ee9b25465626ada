"""The options that reduce the cost of a step, as changes of MILAN's config."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from mmengine.config import ConfigDict
from mmpretrain.structures import DataSample

from mmmilan.teachers.cached import VERSION


def alignment(model: ConfigDict, folder: Path) -> None:
    width, layers = model.backbone.arch['embed_dims'], model.backbone.arch['num_layers']
    model.backbone.out_indices = list(range(layers))
    model.head.type = 'mmmilan.LayerAlignment'
    teacher_width = torch.load(model.head.teacher.pretrained)['visual.conv1.weight'].shape[0]
    model.neck = dict(
        type='mmmilan.LayerMixture', embed_dim=width, num_layers=layers, predict_feature_dim=2 * teacher_width
    )


def cached(model: ConfigDict, folder: Path) -> None:
    side = model.backbone.img_size // model.backbone.patch_size
    sizes = dict(feature_dim=model.neck.predict_feature_dim, num_patches=side**2, grid=[side, side])
    sizes |= dict(width=0, patch_size=model.backbone.patch_size, input_size=[model.backbone.img_size] * 2)
    manifest = dict(version=VERSION, teacher=None, epochs=1, images=0, names=0, seed=0, pipeline=[])
    (folder / 'manifest.json').write_text(json.dumps(manifest | sizes))
    model.type = 'mmmilan.CachedMILAN'
    model.head.teacher = dict(type='mmmilan.CachedTeacher', cache=str(folder))


OPTIONS = {
    'alignment': alignment,
    'cached': cached,
}


def cached_samples(model: ConfigDict, count: int) -> list[DataSample]:
    """Data samples with random cached targets for ``count`` images."""
    side = model.backbone.img_size // model.backbone.patch_size
    samples = [DataSample() for _ in range(count)]
    for sample in samples:
        codes = torch.randint(-127, 128, (1 + side**2, model.neck.predict_feature_dim), dtype=torch.int8)
        sample.set_field(codes, 'cached_codes')
        sample.set_field(torch.rand(1 + side**2), 'cached_scales')
        sample.set_field(torch.rand(side**2), 'cached_importance')
    return samples
