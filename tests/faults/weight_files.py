"""A checkpoint to spoil, and the check that a spoilt one is loaded or refused."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmpretrain.models import VisionTransformer

from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.checkpoints.loading import load_weights
from mmmilan.errors import InputError

ARCH = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32)


def encoder() -> VisionTransformer:
    return VisionTransformer(ARCH, img_size=32, patch_size=16, out_type='avg_featmap')


def honest() -> dict:
    """A checkpoint with everything that MMEngine saves."""
    model = encoder()
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return {
        'meta': {'epoch': 1, 'iter': 2, 'seed': 0, 'cfg': 'a = 1', 'dataset_meta': {'palette': np.arange(3)}},
        'state_dict': {f'backbone.{key}': value for key, value in model.state_dict().items()},
        'message_hub': {'log_scalars': {'train/loss': history}, 'runtime_info': {'iter': 2}, 'resumed_keys': {}},
        'optimizer': optimizer.state_dict(),
        'param_schedulers': [{'last_step': 2, '_last_value': [0.1]}],
    }


def as_encoder(path: Path) -> None:
    load_weights(encoder(), load_checkpoint_file(path), str(path))


def survives(load: Callable, path: Path) -> str | None:
    """Load a file; returns the message with which it is refused, or None. Any other exception fails."""
    started = time.process_time()  # whatever else the machine does
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try:
            load(path)
            message = None
        except InputError as error:
            message = str(error)
            assert path.name in message and '\n' not in message, message
    assert time.process_time() - started < 5
    return message
