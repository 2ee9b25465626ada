"""A small run that several tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def quick(clip_file) -> dict:
    """Arguments with which ``mmmilan.pretrain`` takes seconds."""
    arch = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96)
    options = {'train_dataloader.num_workers': 0, 'test_dataloader.num_workers': 0}
    return dict(arch=arch, teacher=clip_file, img_size=64, batch_size=8, epochs=2, **options)
