"""Errors of a teacher's features and importance in 16 bits, and of the resulting loss, against float32. On a CPU.

python tools/speed/precision.py CHECKPOINT IMAGES

CHECKPOINT is a checkpoint of MILAN, IMAGES a folder. The figures are relative errors (of Frobenius norms), and for
importance also the total variation of the distribution of masks; student and masks are the same in all rows.
"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
import copy
import logging

import torch
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, DefaultScope
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmmilan import get_model
from mmmilan.errors import exit_on_input_error
from mmmilan.evaluation.features import evenly_spaced
from mmmilan.failures import build_errors
from mmmilan.models import MILAN
from mmmilan.teachers import Teacher

Targets = tuple[Tensor, Tensor]  # features [B, 1 + N, C] and importance [B, N]


def in_autocast(teacher: Teacher, images: Tensor, dtype: torch.dtype) -> Targets:
    """Matrix products in 16 bits; norms and the residual stream in float32, as in autocast."""
    with torch.autocast('cpu', dtype):
        return teacher(images)


def in_full(teacher: Teacher, images: Tensor, dtype: torch.dtype) -> Targets:
    """Everything in 16 bits: weights, norms and the residual stream."""
    tower = copy.deepcopy(teacher.tower).to(dtype)
    with torch.no_grad():
        return tower(teacher.prepare(images).to(dtype))


ROWS = {
    'bfloat16, autocast': (in_autocast, torch.bfloat16),
    'bfloat16, all of it': (in_full, torch.bfloat16),
    'float16, autocast': (in_autocast, torch.float16),
    'float16, all of it': (in_full, torch.float16),
}


def read_images(model: MILAN, folder: str, number: int) -> Tensor:
    """Up to ``number`` evenly spaced images of a folder, normalised [B, 3, H, W], by the checkpoint's test pipeline."""
    pipeline = model._config.test_dataloader.dataset.pipeline
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(dict(type='mmmilan.ImageFolder', data_root=folder, pipeline=pipeline))
    images = torch.stack([dataset[index]['inputs'] for index in evenly_spaced(len(dataset), number)])
    return model.data_preprocessor(dict(inputs=images, data_samples=None))['inputs']


def loss_and_gradient(model: MILAN, images: Tensor, targets: Targets) -> tuple[float, Tensor]:
    """Loss and gradient of the student for given targets; the same importance gives the same masks."""
    torch.manual_seed(0)
    model.zero_grad()
    model.head.run_teacher = lambda images: targets
    loss = model.reconstruct(images).image_loss.mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in Frobenius norm."""
    return float((actual - expected).norm() / expected.norm())


def total_variation(importance: Tensor, other: Tensor) -> float:
    """Total variation between the distributions of the first visible patch, mean over images."""
    shares = [each / each.sum(1, keepdim=True) for each in (importance, other)]
    return float((shares[0] - shares[1]).abs().sum(1).mean() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='a checkpoint of MILAN; its teacher is found by its config')
    parser.add_argument('folder', help='folder of images')
    parser.add_argument('--images', type=int, default=300, help='number of images (default: 300)')
    args = parser.parse_args()
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    model = get_model(args.checkpoint, encoder_only=False)
    teacher, images = model.head.teacher, read_images(model, args.folder, args.images)
    features, importance = teacher(images)
    loss, gradient = loss_and_gradient(model, images, (features, importance))
    table = Table(title=f'{len(images)} images, loss in float32: {loss:.6f}', title_justify='left')
    for column in ('', 'features', 'importance', 'total variation', 'loss', 'gradient'):
        table.add_column(column, justify='right' if column else 'left')
    for name, (run, dtype) in ROWS.items():
        tokens, scores = (each.float() for each in run(teacher, images, dtype))
        other_loss, other_gradient = loss_and_gradient(model, images, (tokens, importance))
        table.add_row(
            name,
            f'{relative_error(tokens, features):.3%}',
            f'{relative_error(scores, importance):.3%}',
            f'{total_variation(scores, importance):.3%}',
            f'{other_loss / loss - 1:+.4%}',
            f'{relative_error(other_gradient, gradient):.2%}',
        )
    Console().print(table)


if __name__ == '__main__':
    with exit_on_input_error(), build_errors():
        main()
