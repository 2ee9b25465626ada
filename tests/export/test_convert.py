"""tools/convert_checkpoint.py says what it found, and writes nothing if a weight has no place."""

from __future__ import annotations

import pytest
import torch

from helpers import strip_prefix
from mmmilan.checkpoints.io import load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.layouts import convert


def test_convert_tool_says_what_it_found(run_tool, official, tmp_path, capsys):
    weights = strip_prefix(official, 'milan/')
    save_checkpoint_file(dict(model=weights, epoch=399), tmp_path / 'published.pth')
    run_tool('convert_checkpoint.py', tmp_path / 'published.pth', tmp_path / 'ours.safetensors')
    output = capsys.readouterr().out
    assert 'published.pth: pretraining in the layout of the published MILAN or MAE repository' in output
    assert '(ViT of 2 layers, 48 wide, prompting decoder)' in output
    run_tool('convert_checkpoint.py', tmp_path / 'ours.safetensors', tmp_path / 'back.pth', '--to', 'official')
    back = load_checkpoint_file(tmp_path / 'back.pth')['model']
    assert set(back) == set(weights) and all(torch.equal(back[key], weights[key]) for key in weights)
    arguments = (tmp_path / 'back.pth', tmp_path / 'hf.safetensors', '--to', 'huggingface', '--encoder-only')
    run_tool('convert_checkpoint.py', *arguments)
    encoder = convert(weights, 'huggingface', encoder_only=True)
    assert set(load_checkpoint_file(tmp_path / 'hf.safetensors')['state_dict']) == set(encoder)

    with pytest.raises(SystemExit, match="back.pth: timm has no place for 'decoder.*--encoder-only"):
        run_tool('convert_checkpoint.py', tmp_path / 'back.pth', tmp_path / 'timm.pth', '--to', 'timm')
    save_checkpoint_file({**weights, 'blocks.0.extra': torch.zeros(1)}, tmp_path / 'odd.pth')
    with pytest.raises(SystemExit, match="odd.pth: The key 'blocks.0.extra' is unknown"):
        run_tool('convert_checkpoint.py', tmp_path / 'odd.pth', tmp_path / 'timm.pth')
    assert not (tmp_path / 'timm.pth').exists()
