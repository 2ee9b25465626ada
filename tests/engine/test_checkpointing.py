"""Checkpoints that are written while training goes on hold what training had when they were saved."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from mmengine.runner import checkpoint

from helpers import assert_identical, load_trusted
from mmmilan.engine import CheckpointHook
from mmmilan.errors import InputError

ASYNCHRONOUS = {'default_hooks.checkpoint.asynchronous': True, 'train_dataloader.num_workers': 0}


@pytest.mark.slow
def test_training(tiny_config, run_tool, tmp_path):
    """The same files, and the same weights after resuming."""
    run_tool('train.py', tiny_config({'train_dataloader.num_workers': 0, 'work_dir': str(tmp_path / 'plain')}))
    run_tool('train.py', tiny_config(ASYNCHRONOUS))
    again = tiny_config(ASYNCHRONOUS | {'work_dir': str(tmp_path / 'again')})
    run_tool('train.py', again, '--resume', tmp_path / 'work/epoch_1.pth')
    assert_identical(*(load_trusted(tmp_path / folder / 'epoch_2.pth') for folder in ('again', 'plain')))
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        actual, expected = (load_trusted(tmp_path / folder / name) for folder in ('work', 'plain'))
        assert_identical(actual, expected)
        assert actual['state_dict']._metadata == expected['state_dict']._metadata
    assert (tmp_path / 'work/last_checkpoint').read_text().endswith('epoch_2.pth')


@pytest.mark.parametrize('name', ['vit_{}.pth', 'epoch_{}.pt', 'epoch_1.pth'])
def test_names_that_no_run_finds(name):
    """With them --resume began anew, and a run of mmmilan.pretrain had no checkpoint to make its model of."""
    assert CheckpointHook(filename_tmpl='epoch_{:03d}.pth').filename_tmpl == 'epoch_{:03d}.pth'
    with pytest.raises(InputError, match=f'filename_tmpl={name!r} names checkpoints that no run would find'):
        CheckpointHook(filename_tmpl=name)


def test_a_copy(tmp_path):
    """Changes after saving do not reach the file, although it is written later."""
    hook, free = CheckpointHook(asynchronous=True), threading.Event()
    weights = torch.zeros(3)
    state = dict(state_dict=dict(weight=weights), message_hub=dict(losses=[1.0]))
    write = hook.write
    hook.write = lambda *args: free.wait(60) and write(*args)
    settled: list[Path] = []
    with hook._writing(settled.append, hook.executor):
        checkpoint.save_checkpoint(state, str(tmp_path / 'a.pth'))
    weights += 1
    state['message_hub']['losses'].append(2.0)
    assert not settled and not list(tmp_path.iterdir())
    free.set()
    hook.finish()
    saved = load_trusted(tmp_path / 'a.pth')
    assert saved['state_dict']['weight'].tolist() == [0, 0, 0] and saved['message_hub'] == dict(losses=[1.0])
    assert settled == [tmp_path / 'a.pth']


def test_a_disk_that_is_full(tiny_config, run_tool, tmp_path, monkeypatch):
    """The error is raised at the next checkpoint, or at the end."""

    def full(*args: object) -> None:
        raise InputError('no space left; free some.')

    monkeypatch.setattr(CheckpointHook, 'write', full)
    with pytest.raises(SystemExit, match='error: no space left; free some.'):
        run_tool('train.py', tiny_config(ASYNCHRONOUS))
    assert not list((tmp_path / 'work').glob('*.pth'))
