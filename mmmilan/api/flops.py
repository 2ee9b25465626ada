"""Parameters and operations of a model, as OpenMMLab's metafiles state them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmilan import arguments
from mmmilan.arguments import checked

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.model import BaseModel
    from torch import Tensor


@checked
def get_flops(config: arguments.Path) -> dict[str, int]:
    """Count the parameters of a model, and the FLOPs of its forward pass for one image of its config's size.

    The model is what ``get_model(config)`` gives: of a pretraining config the encoder alone. A multiply-add counts as
    one, as in OpenMMLab's tables. Nothing is computed and no memory taken, for the model is on the ``meta`` device.

    Args:
        config: a config file or a model of the zoo.

    Returns:
        Both numbers, by OpenMMLab's names ``Parameters`` and ``FLOPs``.

    Raises:
        InputError: there is no such model, or it cannot be built.
    """
    import torch

    from mmmilan.api.models import get_model, read_config
    from mmmilan.engine.throughput import counted_flops

    backbone = read_config(config).model.backbone
    size = backbone.get('img_size', 224)
    height, width = (size, size) if isinstance(size, int) else size
    no_download = dict(backbone=dict(teacher=dict(pretrained=None))) if backbone.get('teacher') else {}
    with torch.device('meta'):
        model = get_model(config, **no_download).to('meta')  # to, for buffers that come from NumPy
        with torch.no_grad(), counted_flops() as counter:
            run_all(model, torch.empty(1, 3, height, width))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {'Parameters': parameters, 'FLOPs': counter.get_total_flops() // 2}


def run_all(model: BaseModel, images: Tensor) -> None:
    """Run all of a model; of a two-stage detector all heads, with as many proposals and masks as it may have."""
    if not hasattr(model, 'roi_head'):
        model(images, mode='tensor')
        return
    features, heads, limits = model.extract_feat(images), model.roi_head, model.test_cfg
    model.rpn_head(features)
    for head, extractor, count in (
        (heads.bbox_head, heads.bbox_roi_extractor, limits.rpn.max_per_img),
        (heads.mask_head, heads.mask_roi_extractor, limits.rcnn.max_per_img),
    ):
        head(images.new_empty(count, features[0].shape[1], *extractor.roi_layers[0].output_size))
