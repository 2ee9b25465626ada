"""Features and classes of images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmmilan.api.devices import choose_device
from mmmilan.api.models import get_model
from mmmilan.api.progress import progress
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from mmengine.model import BaseModel
    from PIL.Image import Image
    from torch import Tensor


class Inferencer:
    """A model, and the reading of images for it.

    mmpretrain's inferencers accept the models of :func:`get_model` too. The subclasses add what those lack: PIL images,
    arrays of several images, any of the encoder's tokens (``out_type``), and errors in one sentence.

    Args:
        model: a model, or the ``name`` that :func:`get_model` takes.
        pretrained: as for :func:`get_model`.
        device: where to run, by default on the GPU if there is one.
    """

    def __init__(
        self,
        model: BaseModel | str | os.PathLike,
        pretrained: bool | str | os.PathLike = True,
        device: str | None = None,
    ) -> None:
        from mmengine.dataset import Compose
        from mmengine.registry import DefaultScope
        from mmpretrain.registry import TRANSFORMS

        self.model = get_model(model, pretrained) if isinstance(model, (str, os.PathLike)) else model
        self.model.to(choose_device(device))
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            steps = self.model._config.test_dataloader.dataset.pipeline
            self.load, *steps = [TRANSFORMS.build(step) for step in steps]
        self.prepare = Compose(steps)

    def batches(self, images: Any, batch_size: int) -> Iterator[Tensor]:
        """Normalised batches [B, 3, H, W] on the model's device, with a progress bar."""
        from mmengine.dataset import default_collate

        images = _as_list(images)
        for start in progress(range(0, len(images), batch_size), type(self).__name__):
            batch = [self.prepare(self.read(image)) for image in images[start : start + batch_size]]
            yield self.model.data_preprocessor(default_collate(batch), False)['inputs']

    def read(self, image: str | os.PathLike | np.ndarray | Image) -> dict:
        """Load an image as the first step of the pipeline does.

        Raises:
            InputError: there is no such file, it does not decode, or the array is not uint8 [H, W, 3].
        """
        import numpy as np

        from mmmilan.datasets.decoding import check_aspect_ratio, from_pil

        if isinstance(image, (str, os.PathLike)):
            path = os.fspath(image)
            if '://' not in path and not os.path.isfile(path):
                raise InputError(f'{image} is not a file; give the path of an image.')
            return self.load(dict(img_path=path))
        if not isinstance(image, np.ndarray):  # PIL
            image = from_pil(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(
                f'An array of {image.dtype} {list(image.shape)} is not an image; give uint8 [H, W, 3] in BGR order.'
            )
        check_aspect_ratio(image, 'An array')
        return dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])

    def usable_batches(self, files: Sequence[str], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """As :meth:`batches`, but images that cannot be used are left out: named in the log and counted at the end.

        Yields:
            The positions in ``files`` of the images of a batch, and the batch [B, 3, H, W].
        """
        from mmengine.dataset import default_collate
        from mmengine.logging import print_log

        used = 0
        for start in progress(range(0, len(files), batch_size), type(self).__name__):
            samples = {i: self.try_to_read(files[i]) for i in range(start, min(start + batch_size, len(files)))}
            samples = {i: sample for i, sample in samples.items() if sample is not None}
            used += len(samples)
            if samples:
                batch = self.model.data_preprocessor(default_collate(list(samples.values())), False)
                yield list(samples), batch['inputs']
        if used < len(files):
            text = f'{len(files) - used} of {len(files)} images were left out, see above.'
            print_log(text, logger='current', level=logging.WARNING)

    def try_to_read(self, path: str) -> dict | None:
        """The packed image; None, with a warning in the log, if it cannot be used or was removed meanwhile."""
        from mmengine.logging import print_log

        try:
            return self.prepare(self.read(path))
        except InputError as error:
            print_log(f'Left out: {error}', logger='current', level=logging.WARNING)
            return None


class FeatureExtractor(Inferencer):
    """Extract features of images with a model of the zoo or of your own.

    Args:
        model: a model, the name of a model of the zoo, a config file or a checkpoint of your own.
        pretrained: True for the published weights, or a checkpoint in any layout.
        device: where to run, by default on the GPU if there is one.
        out_type: ``'cls_token'`` [D], ``'avg_featmap'`` (mean of the patch tokens) [D], ``'featmap'`` [D, H/16, W/16]
            or ``'raw'`` (all tokens) [1 + N, D]; by default what the model was trained with.

    Raises:
        InputError: the model, its weights or ``out_type`` is unknown.

    Examples:
        >>> features = FeatureExtractor('milan_vit-base-p16_16xb256-amp-coslr-400e_in1k')(['cat.jpg', 'dog.jpg'])
        >>> features.shape
        torch.Size([2, 768])
    """

    def __init__(
        self,
        model: BaseModel | str | os.PathLike,
        pretrained: bool | str | os.PathLike = True,
        device: str | None = None,
        out_type: str | None = None,
    ) -> None:
        from torch import nn

        super().__init__(model, pretrained, device)
        backbone = self.model.backbone
        if out_type is not None and out_type not in backbone.OUT_TYPES:
            raise InputError(
                f'out_type={out_type!r} is unknown; choose one of {", ".join(sorted(backbone.OUT_TYPES))}.'
            )
        self.out_type = out_type or backbone.out_type
        if self.out_type == 'avg_featmap' and not hasattr(backbone, 'ln2'):
            backbone.ln2 = nn.Identity()  # the tokens have been normed already

    def __call__(self, images: Any, batch_size: int = 32) -> Tensor:
        """Features of each image.

        Args:
            images: one image or a sequence of them: paths, uint8 arrays [H, W, 3] in BGR order (OpenCV's, as in
                mmpretrain) or PIL images; or one array [B, H, W, 3].
            batch_size: number of images that the model sees at once.

        Returns:
            Float tensor [B, ...] on the CPU; ``out_type`` determines its shape.

        Raises:
            InputError: there is no image, or one is missing, does not decode or is not uint8 [H, W, 3].
        """
        import torch

        backbone = self.model.backbone
        trained_with, backbone.out_type = backbone.out_type, self.out_type
        try:
            with torch.no_grad():
                return torch.cat([backbone(batch)[-1].cpu() for batch in self.batches(images, batch_size)])
        finally:
            backbone.out_type = trained_with


class ImageClassificationInferencer(Inferencer):
    """Classify images with a fine-tuned model; arguments and results are those of mmpretrain's inferencer.

    Examples:
        >>> classify = ImageClassificationInferencer('vit-base-p16_milan-pre_8xb128-coslr-100e_in1k-openmmlab')
        >>> classify('cat.jpg')[0]['pred_class']
        'tabby, tabby cat'
    """

    def __call__(self, images: Any, batch_size: int = 32) -> list[dict[str, Any]]:
        """Classify each image.

        Args:
            images: as for :class:`FeatureExtractor`.
            batch_size: number of images that the model sees at once.

        Returns:
            For each image ``pred_scores`` (probabilities, float32 [classes]), ``pred_label`` and ``pred_score`` (the
            best), and ``pred_class`` if the names of the classes are known.

        Raises:
            InputError: the model has no head, or an image cannot be read.
        """
        import torch

        if not self.model.with_head:
            raise InputError('This model has no classification head; choose a fine-tuned one, see list_models("vit").')
        with torch.no_grad():
            scores = [self.model(batch).softmax(1).cpu() for batch in self.batches(images, batch_size)]
        classes = self.model._dataset_meta.get('classes')
        results = []
        for pred_scores in torch.cat(scores):
            label = int(pred_scores.argmax())
            result = dict(pred_scores=pred_scores.numpy(), pred_label=label, pred_score=float(pred_scores[label]))
            results.append({**result, 'pred_class': classes[label]} if classes else result)
        return results


def _as_list(images: Any) -> Sequence:
    """A single image as a sequence of one."""
    import numpy as np

    several = isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4)
    images = images if several else [images]
    if len(images) == 0:
        raise InputError('No images were given; give at least one.')
    return images
