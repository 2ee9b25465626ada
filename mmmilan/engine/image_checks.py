"""Images of a run that do not decode, or are not of the encoder's size."""

from __future__ import annotations

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmmilan.datasets.image_folder import num_corrupt
from mmmilan.models.vit import MILANViT
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS


@HOOKS.register_module()
class CorruptImageHook(Hook):
    """Warn after each epoch of the images that did not decode so far, counted over all processes."""

    def after_train_epoch(self, runner: Runner) -> None:
        count = torch.tensor(num_corrupt(runner.train_dataloader.dataset), device=get_device())
        all_reduce(count)
        if count:
            runner.logger.warning(f'{int(count)} images did not decode so far and were replaced by others.')


@HOOKS.register_module()
class ImageSizeHook(Hook):
    """Warn once if the size of the images is not the encoder's ``img_size``.

    A ViT accepts them, but interpolates its positions and often gives worse results. Detectors and segmentors, which
    take images of any size, are not checked.
    """

    def __init__(self) -> None:
        self.seen = False

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train') -> None:
        if self.seen:
            return
        self.seen = True
        backbone = getattr(unwrap(runner.model), 'backbone', None)
        images = data_batch.get('inputs') if isinstance(data_batch, dict) else None
        image = images[0] if isinstance(images, (list, tuple, Tensor)) and len(images) else None
        if not isinstance(backbone, MILANViT) or not isinstance(image, Tensor) or image.ndim != 3:
            return
        if tuple(image.shape[1:]) != tuple(backbone.img_size):
            runner.logger.warning(
                f'The images are {tuple(image.shape[1:])} but img_size={tuple(backbone.img_size)}: positions are '
                'interpolated; make the sizes in the pipeline and model.backbone.img_size equal unless that is meant.'
            )
