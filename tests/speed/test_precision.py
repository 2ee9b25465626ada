"""The rounding errors of a teacher in 16 bits."""

from __future__ import annotations

import re

import pytest

import mmmilan


def test_float16_is_nearer(tiny_config, run_tool, image_folder, tmp_path, capsys):
    """float16 has three more bits than bfloat16."""
    run_tool('train.py', tiny_config({'train_cfg.max_epochs': 1, 'train_dataloader.num_workers': 0}))
    capsys.readouterr()
    run_tool('speed/precision.py', tmp_path / 'work/epoch_1.pth', image_folder, '--images', 6)
    rows = [re.findall(r'([-+\d.]+)%', line) for line in capsys.readouterr().out.splitlines()]
    bfloat16, bfloat16_all, float16, float16_all = [list(map(float, row)) for row in rows if len(row) == 5]
    for worse, better in ((bfloat16, float16), (bfloat16_all, float16_all)):
        for column in (0, 1, 2, 4):  # features, importance, its total variation, gradient
            assert 0 < better[column] < 0.5 * worse[column]


def test_a_checkpoint_of_one_s_own_images(image_folder, clip_file, run_tool, tmp_path, capsys):
    """Its data set is of several sources, where that of the configs is a folder."""
    arch = dict(embed_dims=48, num_layers=1, num_heads=3, feedforward_channels=96)
    workers = {'train_dataloader.num_workers': 0, 'test_dataloader.num_workers': 0}
    run = dict(arch=arch, teacher=clip_file, img_size=64, batch_size=8, epochs=1)
    weights = mmmilan.pretrain(image_folder, tmp_path / 'run', **run, **workers)
    capsys.readouterr()
    run_tool('speed/precision.py', weights, image_folder / 'class0', '--images', 2)
    assert '2 images, loss in float32' in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r'^error: The data folder \S*/none/ does not exist; [^\n]*$'):
        run_tool('speed/precision.py', weights, tmp_path / 'none')
