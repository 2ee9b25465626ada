"""What 16 bits do to a teacher's features and importance, and so to the loss, against float32. On a CPU.

python tools/speed/precision.py CHECKPOINT IMAGES

The checkpoint is one of MILAN, the folder holds images. The figures are relative errors (of Frobenius norms), and for
importance the total variation of the mask's draw as well; the student and its masks are the same in all rows.
"""

from __future__ import annotations

import argparse
import copy
import logging

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, DefaultScope
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmmilan import get_model
from mmmilan.errors import exit_on_input_error
from mmmilan.models import MILAN
from mmmilan.models.teachers import Teacher

Taught = tuple[Tensor, Tensor]  # features [B, 1 + N, C] and importance [B, N]


def in_autocast(teacher: Teacher, images: Tensor, dtype: torch.dtype) -> Taught:
    """Products in 16 bits; norms and the residual stream in float32, as autocast has them."""
    with torch.autocast('cpu', dtype):
        return teacher(images)


def in_full(teacher: Teacher, images: Tensor, dtype: torch.dtype) -> Taught:
    """All in 16 bits: weights, norms and the residual stream."""
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
    """So many of a folder's images, evenly spaced, by the checkpoint's pipeline for tests, normalised."""
    cfg = copy.deepcopy(model._config.test_dataloader.dataset)
    cfg.update(data_root=folder, with_label=False)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(cfg)
    indices = np.unique(np.linspace(0, len(dataset) - 1, number).astype(int)).tolist()
    images = torch.stack([dataset[index]['inputs'] for index in indices])
    return model.data_preprocessor(dict(inputs=images, data_samples=None))['inputs']


def learn(model: MILAN, images: Tensor, taught: Taught) -> tuple[float, Tensor]:
    """Loss and gradient of the student with what it is taught; with the same importance it has the same masks."""
    torch.manual_seed(0)
    model.zero_grad()
    loss = model.reconstruct(images, cached=taught).view_loss.mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def total_variation(importance: Tensor, other: Tensor) -> float:
    """Of the distributions from which the first visible patch is drawn, the mean over images."""
    shares = [each / each.sum(1, keepdim=True) for each in (importance, other)]
    return float((shares[0] - shares[1]).abs().sum(1).mean() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='a checkpoint of MILAN, whose teacher is where its config says')
    parser.add_argument('folder', help='images')
    parser.add_argument('--images', type=int, default=300, help='how many of them (default: 300)')
    args = parser.parse_args()
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    model = get_model(args.checkpoint, encoder_only=False)
    teacher, images = model.head.teacher, read_images(model, args.folder, args.images)
    features, importance = teacher(images)
    loss, gradient = learn(model, images, (features, importance))
    table = Table(title=f'{len(images)} images, loss in float32: {loss:.6f}', title_justify='left')
    for column in ('', 'features', 'importance', 'total variation', 'loss', 'gradient'):
        table.add_column(column, justify='right' if column else 'left')
    for name, (run, dtype) in ROWS.items():
        tokens, scores = (each.float() for each in run(teacher, images, dtype))
        other_loss, other_gradient = learn(model, images, (tokens, importance))
        table.add_row(
            name,
            f'{error(tokens, features):.3%}',
            f'{error(scores, importance):.3%}',
            f'{total_variation(scores, importance):.3%}',
            f'{other_loss / loss - 1:+.4%}',
            f'{error(other_gradient, gradient):.2%}',
        )
    Console().print(table)


if __name__ == '__main__':
    with exit_on_input_error():
        main()
