"""Export an encoder, a classifier or a segmentor as ONNX, with what it takes and gives in the file's metadata."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmmilan import arguments
from mmmilan.arguments import checked
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from torch import Tensor, nn

    from mmmilan.export.preprocessing import Preprocessing

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
BOUND = 1e-4  # of a relative error in float32
RESIZED_BOUND = 1e-3  # of a relative error where the graph resizes: a few pixels round to the next of 256 values


@checked
def export_onnx(
    checkpoint: arguments.Path,
    out: arguments.Path,
    *,
    resize: Literal['before', 'graph'] = 'before',
    overwrite: bool = False,
) -> Path:
    """Write an encoder, a classifier or a segmentor as ONNX, and compare its outputs in onnxruntime with PyTorch's.

    The input ``images`` is float32 [B, 3, H, W], RGB from 0 to 1, for any B; the model includes the normalisation. The
    outputs are float32. Of a classifier: ``probabilities`` [B, classes]. Of a segmentor: ``logits`` [B, classes, H, W].
    Of an encoder: ``class_token`` and ``mean_token`` [B, D], ``patch_tokens`` [B, N, D] and, if the checkpoint
    compares images with texts (MILAN with its decoder, MaskCLIP), ``embedding`` [B, C], of length 1 in their space.

    The file's metadata says the ``task``, the names of the ``classes`` (JSON), and under ``preprocessing`` (JSON) how a
    photo becomes the input: the ``short_edge`` or ``size`` (height, width) that it is resized to, or the long and short
    edge that it stays ``within``, by which ``interpolation`` of which ``library``; the centre ``crop``; ``size`` and
    ``stride`` of the ``windows`` that a segmentor slides over it; ``mean`` and ``std`` of the normalisation inside.

    The relative error of every output must be at most 1e-4, on batches of one and of three random images.

    Args:
        checkpoint: a model of the zoo, or a checkpoint of your own.
        out: file to write, .onnx.
        resize: 'graph' puts resizing and crop into the model. ``images`` are then photos as Pillow reads them: uint8
            [B, height, width, 3], RGB, of any one size. The outputs for photos of several sizes must be those of the
            checkpoint's own test pipeline, to 1e-3.
        overwrite: replace the file if there is one.

    Returns:
        The path of the file.

    Raises:
        InputError: onnx, onnxscript or onnxruntime is not installed, the checkpoint is a detector or of another kind
            that is not exported, the outputs differ, ONNX cannot resize as the test pipeline does, or the file must not
            or cannot be written. In these cases nothing is written.

    Examples:
        >>> mmmilan.export_onnx('runs/photos/milan.pth', 'photos.onnx')
    """
    import torch

    from mmmilan.api.models import get_model
    from mmmilan.export.onnx_resizing import photos, prepare, prepend_resizing
    from mmmilan.files import atomic_write, check_output

    path = check_output(out, [checkpoint], endings=('.onnx',), overwrite=overwrite)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'ONNX needs {" and ".join(missing)}; pip install {" ".join(missing)}.')
    model = get_model(checkpoint, pretrained=True, device='cpu')
    task = exported_task(model, checkpoint)
    says, preparation = describe(model, task)
    exported = build_exported(model, task, checkpoint).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, *says['input_size'], generator=generator)
    with atomic_write(path) as temporary:
        write(exported, images[:2], temporary, checkpoint)
        for batch in (images[:1], images):
            compare(run(exported, batch), run_onnx(temporary, batch.numpy()), BOUND, path, 'PyTorch')
        if resize == 'graph':
            prepend_resizing(temporary, says, preparation, path)
            for photo in photos():
                expected = run(exported, prepare(model, photo))
                compare(expected, run_onnx(temporary, photo[None]), RESIZED_BOUND, path, 'the test pipeline')
        add_metadata(temporary, says)
    return path


def exported_task(model: nn.Module, checkpoint: str | os.PathLike) -> str:
    """'features' of a model without a head, or the task that a model predicts: 'classification' or 'segmentation'.

    Raises:
        InputError: the model is of another kind.
    """
    from mmpretrain.models import ClsHead, ImageClassifier, MultiLabelClsHead

    from mmmilan.evaluation.predictions import predicted_task

    if isinstance(model, ImageClassifier) and not model.with_head:
        return 'features'
    try:
        task = predicted_task(model)
    except InputError as error:
        raise InputError(
            f'{checkpoint} is a {type(model).__name__}, which is not exported to ONNX; give an encoder, a classifier '
            'or a segmentor.'
        ) from error
    if task == 'detection':
        raise InputError(
            f'{checkpoint} is a detector, whose number of boxes depends on the image, which is not exported to ONNX; '
            "use mmmilan predict or mmdet's DetInferencer, or export the encoder that it started from."
        )
    if task == 'classification' and (not isinstance(model.head, ClsHead) or isinstance(model.head, MultiLabelClsHead)):
        raise InputError(
            f'{checkpoint} ends in a {type(model.head).__name__}, which is not exported to ONNX; give a classifier of '
            'one class for each image, or its encoder (mmmilan convert --encoder-only).'
        )
    return task


def input_size(model: nn.Module, preparation: Preprocessing | None) -> list[int]:
    """Height and width of the images, or of the windows of a segmentor.

    Raises:
        InputError: neither the encoder nor the test pipeline has a size of images.
    """
    test_cfg = getattr(model, 'test_cfg', None) or {}
    if test_cfg.get('mode') == 'slide':
        return list(test_cfg['crop_size'])
    size = preparation.size if preparation else getattr(model.backbone, 'img_size', None)
    if size is None:
        raise InputError(
            f'This {type(model.backbone).__name__} takes images of any size, and an ONNX file images of one; give the '
            'test pipeline ResizeEdge (short edge) and CenterCrop, or Resize.'
        )
    return list(size)


def describe(model: nn.Module, task: str) -> tuple[dict[str, Any], Preprocessing | None]:
    """What the file says of itself, and its preprocessing if it is one of those that other libraries have too.

    Raises:
        InputError: the model takes images of any size, or the names of its classes are not as many as the classes.
    """
    from mmmilan.checkpoints.task_config import test_dataset
    from mmmilan.components import type_name
    from mmmilan.evaluation.predictions import all_names
    from mmmilan.export.preprocessing import normalisation, read_preprocessing

    preparation, steps = None, test_dataset(model._config)['pipeline']
    mean, std = normalisation(model)
    values = dict(colours='RGB', range=[0, 1], mean=mean, std=std, normalised='in the model')
    resize = next((step for step in steps if type_name(step) == 'Resize'), {})
    if task == 'segmentation' and resize.get('keep_ratio'):
        long, short = max(resize['scale']), min(resize['scale'])
        library, interpolation = resize.get('backend') or 'cv2', resize.get('interpolation', 'bilinear')
        values |= dict(within=[long, short], library=library, interpolation=interpolation)
        if model.test_cfg.mode != 'slide':
            raise InputError(
                'This segmentor takes whole images of any shape, and an ONNX file images of one; export it with a '
                "config whose test_cfg is dict(mode='slide', crop_size=..., stride=...), or whose Resize has no "
                'keep_ratio.'
            )
    else:
        try:
            preparation = read_preprocessing(model._config, model)
            values |= preparation.in_words()
        except InputError:  # it has no words for these steps
            values['pipeline'] = [dict(step) for step in steps]
    if task == 'segmentation' and model.test_cfg.mode == 'slide':
        values['windows'] = dict(size=list(model.test_cfg.crop_size), stride=list(model.test_cfg.stride))
    says = dict(task=task, input_size=input_size(model, preparation), preprocessing=values)
    if task != 'features':
        says['classes'] = all_names(model, task)
    return says, preparation


def build_exported(model: nn.Module, task: str, checkpoint: str | os.PathLike) -> nn.Module:
    """A module from images [B, 3, H, W], RGB from 0 to 1, to a dictionary of outputs."""
    from torch import nn

    from mmmilan.api.models import build_embedder
    from mmmilan.export.preprocessing import mean_and_std, takes_rgb

    is_rgb = takes_rgb(model)

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_embedder(model, checkpoint) if task == 'features' else model
            mean, std = mean_and_std(model)
            self.register_buffer('mean', mean)
            self.register_buffer('std', std)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            images = ((images if is_rgb else images.flip(1)) - self.mean) / self.std
            if task == 'features':
                return self.model(images)
            if task == 'classification':
                return dict(probabilities=self.model(images).softmax(1))
            return dict(logits=self.model.encode_decode(images, [dict(img_shape=images.shape[2:])]))

    return Exported()


def write(exported: nn.Module, images: Tensor, path: str, checkpoint: str | os.PathLike) -> None:
    """Export for any batch size.

    Raises:
        InputError: PyTorch cannot express the model in ONNX, or fixed the batch size.
    """
    import onnx
    import torch

    batch = torch.export.Dim('batch')
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')  # the exporter warns about its own code
            logging.getLogger('torch.onnx').setLevel(logging.ERROR)
            logging.getLogger('onnxscript').setLevel(logging.ERROR)
            torch.onnx.export(
                exported,
                (images,),
                path,
                input_names=['images'],
                output_names=list(exported(images)),
                dynamic_shapes=dict(images={0: batch}),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f'{checkpoint} cannot be expressed in ONNX ({str(error.__cause__ or error).strip().splitlines()[0]}); use '
            'mmmilan predict or embed.'
        ) from error
    if not onnx.load(path, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise InputError(f'{checkpoint} has a layer that only takes batches of {len(images)}; use mmmilan predict.')


def run(exported: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The outputs of PyTorch."""
    import torch

    with torch.no_grad():
        return exported(images)


def run_onnx(path: str, images: np.ndarray) -> dict[str, Tensor]:
    """The outputs of onnxruntime."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    values = map(torch.from_numpy, session.run(None, {'images': images}))
    return dict(zip(names, values, strict=True))


def compare(expected: dict[str, Tensor], actual: dict[str, Tensor], bound: float, path: Path, source: str) -> None:
    """Raise an :class:`InputError` if outputs differ from those of a ``source`` by more than a part of their length."""
    for name, values in expected.items():
        channels = 1 if values.ndim == 4 else -1
        error = ((actual[name] - values).norm(dim=channels) / values.norm(dim=channels)).max()
        if error <= bound:
            continue
        remedy = 'try another version of onnxruntime' if source == 'PyTorch' else 'leave out resize (--resize)'
        raise InputError(
            f'{path} was not written: its {name} differs from that of {source} by {float(error):.1e} of its length, '
            f'where {bound:.0e} is allowed; {remedy}.'
        )


def add_metadata(path: str, says: dict[str, Any]) -> None:
    """Write what the file says of itself: texts as they are, the rest as JSON."""
    import onnx

    from mmmilan.version import __version__

    model = onnx.load(path)
    texts = {key: each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for key, each in says.items()}
    onnx.helper.set_model_props(model, texts | dict(mmmilan=__version__))
    onnx.save(model, path)
