"""Parameters and operations of a model, as OpenMMLab's metafiles state them."""

from __future__ import annotations

import os

import torch
from mmengine.model import BaseModel

from mmmilan.api.models import get_model
from mmmilan.engine.throughput import counted_flops


def complexity(name: str | os.PathLike) -> tuple[int, int]:
    """Parameters of a model, and FLOPs of its forward pass for one image of its config's size.

    The model is what ``get_model(name)`` gives: of a pretraining config the encoder alone. A multiply-add counts as one,
    as in OpenMMLab's tables. Nothing is computed and no memory taken, for the model is on PyTorch's ``meta`` device.

    Args:
        name: A model of the zoo or a config file.

    Raises:
        InputError: there is no such model.
    """
    with torch.device('meta'):
        model = get_model(name, **_without_weights(name))
    model = model.to('meta')  # buffers that come from NumPy
    size = model._config.model.backbone.get('img_size', 224)
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad(), counted_flops() as counter:
        run(model, torch.empty(1, 3, height, width, device='meta'))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def _without_weights(name: str | os.PathLike) -> dict:
    """Changes of the config with which a teacher in the encoder needs no download."""
    from mmmilan.api.models import read_config

    teacher = read_config(name).model.backbone.get('teacher')
    return dict(backbone=dict(teacher=dict(pretrained=None))) if teacher else {}


def run(model: BaseModel, images: torch.Tensor) -> None:
    """Run all of a model; of a detector all heads, with as many proposals and masks as it may have at most."""
    if not hasattr(model, 'roi_head'):
        model(images, mode='tensor')
        return
    features = model.extract_feat(images)
    model.rpn_head(features)
    heads, limits = model.roi_head, model.test_cfg
    channels = features[0].shape[1]
    for head, extractor, count in (
        (heads.bbox_head, heads.bbox_roi_extractor, limits.rpn.max_per_img),
        (heads.mask_head, heads.mask_roi_extractor, limits.rcnn.max_per_img),
    ):
        height, width = extractor.roi_layers[0].output_size
        head(images.new_empty(count, channels, height, width))
