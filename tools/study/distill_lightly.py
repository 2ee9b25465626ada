"""Train the study's encoder with LightlyTrain: a process of its own, by a Python that has lightly-train and mmmilan.

LightlyTrain (AGPL-3.0) is only compared with: mmmilan never depends on it. This follows its public documentation
(docs.lightly.ai/train, custom models). The teacher gives the tokens that are MILAN's target.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightly_train
import torch
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mmmilan.models  # noqa: F401 (registers)
from mmmilan.files import atomic_write, write_text
from mmmilan.models.wrapping import Frozen
from mmmilan.registry import MODELS


class Wrapped(nn.Module):
    """What LightlyTrain asks of a custom model: maps of patch tokens, and the class token as what is pooled.

    Args:
        model: Gives tokens [B, 1 + N, D] of images [B, 3, H, W], or a tuple with them.
        width: D.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.study_model = model
        self.width = width

    def get_model(self) -> nn.Module:
        return self.study_model

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.study_model(images)[0]
        side = round((tokens.shape[1] - 1) ** 0.5)
        return dict(features=tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side)), class_token=tokens[:, 0])

    def forward_pool(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(pooled_features=features['class_token'][:, :, None, None])

    def feature_dim(self) -> int:
        return self.width

    def architecture_info(self) -> dict[str, str]:
        return dict(model_type='transformer', norm_type='layernorm')


def distil(job: dict[str, Any]) -> None:
    """Train, or go on; write ``epoch_N.pth`` for each epoch, then ``training.json``, as the study's other runs do."""
    torch.set_num_threads(1)
    init_default_scope('mmpretrain')
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    torch.manual_seed(job['seed'])
    student = MODELS.build(job['backbone'] | dict(out_type='raw'))
    student.init_weights()
    teacher = MODELS.build(job['teacher']).eval()
    folder = Path(job['folder'])
    options = job['pretrain']
    options['method_args']['teacher'] = Wrapped(Frozen(teacher), teacher.feature_dim)
    begun = (folder / 'lightly' / 'checkpoints' / 'last.ckpt').exists()
    start = time.process_time()
    lightly_train.pretrain(
        out=folder / 'lightly',
        model=Wrapped(student, student.embed_dims),
        seed=job['seed'],
        accelerator='cpu',
        devices=1,
        num_workers=0,
        precision='32-true',
        loggers=dict(tensorboard=None),
        callbacks=dict(model_checkpoint=dict(every_n_epochs=1, save_top_k=-1, filename='{epoch}')),
        resume_interrupted=begun,
        overwrite=not begun,
        **options,
    )
    seconds = time.process_time() - start
    for path in (folder / 'lightly' / 'checkpoints').glob('epoch=*.ckpt'):
        weights = torch.load(path, map_location='cpu', weights_only=False)['state_dict']
        save_encoder(weights, folder / f'epoch_{1 + int(path.stem.removeprefix("epoch="))}.pth')
    images, epochs = len(options['data']), options['epochs']
    line = dict(images=images * epochs, epochs=epochs, cpu_seconds=round(seconds, 1), resumed=begun)
    write_text(folder / 'training.json', json.dumps(line) + '\n')


def save_encoder(weights: dict[str, Tensor], path: Path) -> None:
    """Save the student's encoder, from the weights of LightlyTrain's model, as the study's checkpoints hold it."""
    mark = 'study_model.'
    encoder = {'backbone.' + key.split(mark)[1]: value for key, value in weights.items() if mark in key}
    with atomic_write(path) as temporary:
        torch.save(dict(state_dict=encoder, meta={}), temporary)


if __name__ == '__main__':
    distil(json.loads(Path(sys.argv[1]).read_text(encoding='utf-8')))
