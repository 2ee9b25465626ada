"""Export an encoder as ONNX."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan import arguments
from mmmilan.arguments import checked
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from torch import Tensor, nn

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
BOUND = 1e-4  # of a relative error in float32


@checked
def export_onnx(checkpoint: arguments.Path, out: arguments.Path, *, overwrite: bool = False) -> Path:
    """Write an encoder as ONNX, and compare its outputs in onnxruntime with those of PyTorch.

    The input ``images`` is float32 [B, 3, H, W], RGB from 0 to 1, for any B; the model includes the normalisation. The
    outputs, float32, are ``class_token`` and ``mean_token`` [B, D], ``patch_tokens`` [B, N, D] and, if the checkpoint
    has a decoder that predicts CLIP features, ``embedding`` [B, C], of length 1 in the joint space of image and text.

    The relative error of every feature must be at most 1e-4, on batches of one and of three random images.

    Args:
        checkpoint: a model of the zoo, or a checkpoint of your own.
        out: file to write, .onnx.
        overwrite: replace the file if there is one.

    Returns:
        The path of the file.

    Raises:
        InputError: onnx, onnxscript or onnxruntime is not installed, the checkpoint has no encoder, the outputs differ,
            or the file must not or cannot be written. In these cases nothing is written.

    Examples:
        >>> mmmilan.export_onnx('runs/photos/milan.pth', 'photos.onnx')
    """
    import torch

    from mmmilan.api.models import get_model
    from mmmilan.files import atomic_write, check_output

    path = check_output(out, [checkpoint], endings=('.onnx',), overwrite=overwrite)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'ONNX needs {" and ".join(missing)}; pip install {" ".join(missing)}.')
    model = get_model(checkpoint, pretrained=True, device='cpu')
    encoder = build_encoder(model, checkpoint).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, *model.backbone.img_size, generator=generator)
    with atomic_write(path) as temporary:
        write(encoder, images[:2], temporary)
        for batch in (images[:1], images):
            compare(encoder, batch, temporary, path)
    return path


def build_encoder(model: nn.Module, checkpoint: str | os.PathLike) -> nn.Module:
    """A module from images [B, 3, H, W], RGB from 0 to 1, to a dictionary of features."""
    from torch import nn

    from mmmilan.api.models import build_embedder

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedder = build_embedder(model, checkpoint)
            self.register_buffer('mean', model.data_preprocessor.mean / 255)
            self.register_buffer('std', model.data_preprocessor.std / 255)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return self.embedder((images - self.mean) / self.std)

    return Encoder()


def write(encoder: nn.Module, images: Tensor, path: str) -> None:
    """Export for any batch size."""
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # the exporter warns about its own code
        logging.getLogger('torch.onnx').setLevel(logging.ERROR)
        torch.onnx.export(
            encoder,
            (images,),
            path,
            input_names=['images'],
            output_names=list(encoder(images)),
            dynamic_shapes=dict(images={0: torch.export.Dim('batch')}),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def compare(encoder: nn.Module, images: Tensor, written: str, path: Path) -> None:
    """Raise an :class:`InputError` if the outputs of the file ``written`` differ from those of PyTorch."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(written, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {'images': images.numpy()}), strict=True))
    with torch.no_grad():
        expected = encoder(images)
    for name, values in expected.items():
        difference = (torch.from_numpy(outputs[name]) - values).norm(dim=-1) / values.norm(dim=-1)
        if not difference.max() <= BOUND:
            raise InputError(
                f'{path} was not written: its {name} differs from that of PyTorch by {float(difference.max()):.1e} of '
                'its length; try another version of onnxruntime.'
            )
