"""Features and predictions of images, in Python: what reads images for a model and gives what it says of them."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from mmmilan import arguments
from mmmilan.api.models import get_model
from mmmilan.arguments import check_path, checked
from mmmilan.errors import InputError, shown

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from mmengine.config import Config
    from PIL.Image import Image
    from torch import Tensor

    from mmmilan.evaluation.features import Arrays
    from mmmilan.evaluation.predictions import Result


def check_model(name: str, value: Any) -> Any:
    """A model of :func:`get_model`, or what names one."""
    if isinstance(value, (str, os.PathLike)):
        return check_path(name, value)
    if not hasattr(value, '_config') or not hasattr(value, 'data_preprocessor'):
        raise InputError(f'{name}={shown(value)} is no model; give one of mmmilan.get_model, or a name or file for it.')
    return value


Model = Annotated[Any, check_model]


class Inferencer:
    """A model, and the reading of images for it.

    mmpretrain's inferencers accept the models of :func:`get_model` too. The subclasses add what those lack: PIL images,
    arrays of several images, any of the encoder's tokens (``out_type``), and errors in one sentence.

    Args:
        model: a model, or the ``name`` that :func:`get_model` takes.
        pretrained: as for :func:`get_model`.
        device: where to run, by default on the GPU if there is one.
    """

    @checked
    def __init__(
        self,
        model: Model,
        pretrained: bool | arguments.Path = True,
        device: arguments.Device | None = None,
    ) -> None:
        from mmengine.dataset import Compose

        from mmmilan.building import in_scope
        from mmmilan.evaluation.features import choose_device

        self.model = get_model(model, pretrained) if isinstance(model, (str, os.PathLike)) else model
        self.model.to(choose_device(device))
        load, *steps = test_steps(self.model._config)
        with in_scope(self.model._config):
            self.load, self.prepare = Compose([load]), Compose(steps)

    def extract(
        self, images: Sequence, encode: Callable[[Tensor], dict[str, Tensor]], description: str = '', **options: Any
    ) -> Iterator[Arrays]:
        """:func:`mmmilan.evaluation.features.extract` of images: paths, arrays or PIL images."""
        from mmmilan.evaluation.features import extract

        return extract(Images(images, self), self.model.data_preprocessor, encode, description, **options)

    def encode(self, images: Sequence, encode: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
        """What a function from normalised images [B, 3, H, W] to [B, ...] gives of all images, [M, ...] on the CPU.

        Raises:
            InputError: an image cannot be used.
        """
        import torch

        from mmmilan.evaluation.features import join

        options = dict(batch_size=batch_size, num_workers=0, skip=False, shared=False)
        batches = self.extract(images, lambda inputs: dict(rows=encode(inputs)), type(self).__name__, **options)
        return torch.from_numpy(join(batches)['rows'])

    @checked
    def inputs(self, images: arguments.Images) -> Tensor:
        """Normalised images [B, 3, H, W] on the model's device."""
        return self.encode(images, lambda inputs: inputs, 32).to(next(self.model.parameters()).device)

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


def test_steps(config: Config) -> list[dict]:
    """The steps that read an image in evaluation, by our own decoding, without those that load annotations."""
    from mmmilan.checkpoints.task_config import loads_annotations, test_dataset
    from mmmilan.components import type_name

    steps = [copy.deepcopy(step) for step in test_dataset(config)['pipeline'] if not loads_annotations(step)]
    if type_name(steps[0]) == 'LoadImageFromFile':
        steps[0] = dict(type='mmmilan.LoadImage', backend_args=steps[0].get('backend_args'))
    return steps


class Images:
    """Data set of images, each after the pipeline of a model.

    Args:
        images: Paths, arrays or PIL images.
        reader: Of the model.
    """

    def __init__(self, images: Sequence, reader: Inferencer) -> None:
        from mmmilan.datasets.listing import Names

        if all(isinstance(image, (str, os.PathLike)) for image in images):
            # a list would be copied into each worker, string by string
            images = images if isinstance(images, Names) else Names(map(os.fspath, images))
        self.images, self.reader = images, reader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return self.reader.prepare(self.read(index))

    def read(self, index: int) -> dict:
        """An image after the first step of the pipeline."""
        return self.reader.read(self.images[index])


class FeatureExtractor(Inferencer):
    """Extract features of images with a model of the zoo or of your own.

    Args:
        model: a model, the name of a model of the zoo, a config file or a checkpoint of your own.
        pretrained: True for the published weights, or a checkpoint in any layout.
        device: where to run, by default on the GPU if there is one.
        out_type: ``'cls_token'`` [D], ``'avg_featmap'`` (mean of the patch tokens) [D], ``'featmap'`` [D, rows,
            columns] or ``'raw'`` (all tokens) [1 + N, D]; by default what the model was trained with.

    Raises:
        InputError: the model, its weights or ``out_type`` is unknown.

    Examples:
        >>> features = FeatureExtractor('milan_vit-base-p16_16xb256-amp-coslr-400e_in1k')(['cat.jpg', 'dog.jpg'])
        >>> features.shape
        torch.Size([2, 768])
    """

    @checked
    def __init__(
        self,
        model: Model,
        pretrained: bool | arguments.Path = True,
        device: arguments.Device | None = None,
        out_type: str | None = None,
    ) -> None:
        from torch import nn

        from mmmilan.evaluation.features import check_tokens

        super().__init__(model, pretrained, device)
        backbone = self.model.backbone
        check_tokens(backbone)
        if out_type is not None and out_type not in backbone.OUT_TYPES:
            raise InputError(
                f'out_type={out_type!r} is unknown; choose one of {", ".join(sorted(backbone.OUT_TYPES))}.'
            )
        self.out_type = out_type or backbone.out_type
        if self.out_type == 'avg_featmap' and not hasattr(backbone, 'ln2'):
            backbone.ln2 = nn.Identity()  # the tokens have been normed already

    @checked
    def __call__(self, images: arguments.Images, batch_size: arguments.Count = 32) -> Tensor:
        """Features of each image.

        Args:
            images: one image or an iterable of them: paths, uint8 arrays [H, W, 3] in BGR order (OpenCV's, as in
                mmpretrain) or PIL images; or one array [B, H, W, 3].
            batch_size: number of images that the model sees at once.

        Returns:
            Float tensor [B, ...] on the CPU; ``out_type`` determines its shape.

        Raises:
            InputError: there is no image, or one is missing, does not decode or is not uint8 [H, W, 3].
        """
        from mmmilan.evaluation.features import output_as

        backbone = self.model.backbone
        return self.encode(images, lambda inputs: output_as(self.out_type, backbone, inputs), batch_size)


class Predictor(Inferencer):
    """Predict with a classifier, detector or segmentor: a checkpoint of ``finetune`` or ``train``, or one of the zoo.

    Args:
        checkpoint: a checkpoint of your own or the name of a model of the zoo, with a head; or a model of
            :func:`get_model`.
        device: where to run, by default on the GPU if there is one.

    Attributes:
        task: 'classification', 'detection' or 'segmentation'.
        classes: names of the classes, in the order of the labels.

    Raises:
        InputError: the checkpoint has no head, or its head and its names of classes do not agree.

    Examples:
        >>> predict = Predictor('runs/birds/model.pth')
        >>> best = predict('robin.jpg')[0]
        >>> predict.classes[best['labels'][0]], best['scores'][0]
        ('robin', 0.98)
    """

    @checked
    def __init__(self, checkpoint: Model, device: arguments.Device | None = None) -> None:
        from mmmilan.evaluation.predictions import all_names, predicted_task

        super().__init__(checkpoint, True, device)
        self.task = predicted_task(self.model)
        self.classes = all_names(self.model, self.task)

    @property
    def batch_size(self) -> int:
        """The number of images at once in the evaluations of the training, at most 64."""
        loader = self.model._config.get('test_dataloader') or self.model._config.val_dataloader
        return min(int(loader.get('batch_size', 1)), 64)

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        """A colour for each class: those of the data set, else evenly spaced hues."""
        from mmmilan.visualization.pictures import colours_of

        return colours_of(self.model._dataset_meta, self.classes)

    @checked
    def __call__(self, images: arguments.Images, batch_size: arguments.Count | None = None) -> list[Result]:
        """Predict for each image.

        Args:
            images: as for :class:`FeatureExtractor`: paths, uint8 arrays [H, W, 3] in BGR order or PIL images.
            batch_size: number of images that the model sees at once, by default that of the checkpoint's evaluation,
                but at most 64.

        Returns:
            For each image arrays by name, in pixels of the image: of a classifier ``labels`` [C], best first, and
            their ``scores`` [C]; of a detector ``boxes`` [K, 4] (left, top, right, bottom), ``labels``, ``scores`` [K],
            ``size`` [2] (height, width) and ``masks`` (bool [K, H, W], if it has masks); of a segmentor ``map`` [H, W].
            Labels are places in ``classes``.

        Raises:
            InputError: there is no image, or one is missing, does not decode or is not uint8 [H, W, 3].
        """
        options = dict(batch_size=batch_size or self.batch_size, num_workers=0, skip=False, shared=False)

        def compute(samples: list[dict], positions: np.ndarray) -> Arrays:
            return dict(result=as_column(self.predict(samples)))

        batches = self.each_batch(Images(images, self), compute, type(self).__name__, **options)
        return [result for batch in batches for result in batch['result']]

    def each_batch(
        self, images: Images, compute: Callable[[list[dict], np.ndarray], Arrays], description: str, **options: Any
    ) -> Iterator[Arrays]:
        """:func:`mmmilan.evaluation.features.each_batch` of images, whose batches are lists of what the images give."""
        from mmmilan.evaluation.features import each_batch

        return each_batch(images, list, compute, description, **options)

    def predict(self, samples: Sequence[dict]) -> list[Result]:
        """Predictions for images after the pipeline of the model.

        Images of one shape go through the model together, so that no result depends on the padding of another image.
        """
        import torch

        from mmmilan.building import in_scope
        from mmmilan.evaluation.predictions import predicted

        places, results = defaultdict(list), [{} for _ in samples]
        for place, sample in enumerate(samples):
            places[tuple(sample['inputs'].shape)].append(place)
        with torch.no_grad(), in_scope(self.model._config):
            for same in places.values():
                batch = {name: [samples[place][name] for place in same] for name in ('inputs', 'data_samples')}
                for place, sample in zip(same, self.model.test_step(batch), strict=True):
                    results[place] = predicted(sample, self.task)
        return results


class ImageClassificationInferencer(Predictor):
    """Classify images with a fine-tuned model; the results are those of mmpretrain's inferencer of this name.

    Examples:
        >>> classify = ImageClassificationInferencer('vit-base-p16_milan-pre_8xb128-coslr-100e_in1k-openmmlab')
        >>> classify('cat.jpg')[0]['pred_class']
        'tabby, tabby cat'
    """

    @checked
    def __init__(
        self,
        model: Model,
        pretrained: bool | arguments.Path = True,
        device: arguments.Device | None = None,
    ) -> None:
        super().__init__(get_model(model, pretrained) if isinstance(model, (str, os.PathLike)) else model, device)
        if self.task != 'classification':
            raise InputError(f'This model is for {self.task}; use mmmilan.Predictor.')

    @checked
    def __call__(self, images: arguments.Images, batch_size: arguments.Count = 32) -> list[dict[str, Any]]:
        """Classify each image.

        Args:
            images: as for :class:`FeatureExtractor`.
            batch_size: number of images that the model sees at once.

        Returns:
            For each image ``pred_scores`` (probabilities, float32 [classes]), ``pred_label`` and ``pred_score`` (the
            best), and ``pred_class`` if the names of the classes are known.

        Raises:
            InputError: an image cannot be read.
        """
        results = []
        for result in super().__call__(images, batch_size):
            label, scores = int(result['labels'][0]), result['scores'][result['labels'].argsort()]
            named = dict(pred_class=self.classes[label]) if self.model._dataset_meta.get('classes') else {}
            results.append(dict(pred_scores=scores, pred_label=label, pred_score=float(scores[label])) | named)
        return results


def as_column(values: Sequence) -> np.ndarray:
    """Any objects as an array [B]."""
    import numpy as np

    column = np.empty(len(values), object)
    for i, value in enumerate(values):
        column[i] = value
    return column
