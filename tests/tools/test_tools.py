"""The command-line tools, as a user calls them."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from helpers import ROOT, read_scalars, rest_slow
from processes import run_script


def used_config(work_dir: Path) -> str:
    """The config that a run dumped, with all options merged in."""
    return max(work_dir.glob('*.py'), key=os.path.getmtime).read_text()


FLOAT32 = {'optim_wrapper.type': 'OptimWrapper', 'train_cfg.max_epochs': 1}


@pytest.mark.slow
def test_amp(tiny_config, run_tool, tmp_path, bfloat16):
    """bfloat16 where the config has float32; a config that has chosen its precision keeps it."""
    run_tool('train.py', tiny_config(FLOAT32), '--work-dir', tmp_path / 'float32')
    run_tool('train.py', tiny_config(FLOAT32), '--work-dir', tmp_path / 'amp', '--amp')
    assert "type='mmmilan.BFloat16OptimWrapper'" in used_config(tmp_path / 'amp')
    assert "type='OptimWrapper'" in used_config(tmp_path / 'float32')
    expected = [record['loss'] for record in read_scalars(tmp_path / 'float32')]
    losses = [record['loss'] for record in read_scalars(tmp_path / 'amp')]
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.02)

    config = tiny_config(FLOAT32 | {'optim_wrapper.type': 'mmmilan.BFloat16OptimWrapper'})
    run_tool('train.py', config, '--work-dir', tmp_path / 'both', '--amp')
    assert [record['loss'] for record in read_scalars(tmp_path / 'both')] == losses


@pytest.mark.parametrize('accumulative_counts', rest_slow([1, 3], 3))
@pytest.mark.parametrize('by_option', rest_slow([True, False], True))
def test_auto_scale_lr(tiny_config, run_tool, tmp_path, accumulative_counts, by_option):
    """The rate is scaled by the images of one step, accumulated ones included, over 4096; by option or config."""
    changes = {'optim_wrapper.accumulative_counts': accumulative_counts, 'param_scheduler': None} | FLOAT32
    if by_option:
        run_tool('train.py', tiny_config(changes), '--auto-scale-lr')
    else:
        run_tool('train.py', tiny_config(changes | {'auto_scale_lr.enable': True}))
    (rate,) = {record['lr'] for record in read_scalars(tmp_path / 'work')}
    assert rate == pytest.approx(2.4e-3 * 4 * accumulative_counts / 4096)
    (written,) = (tmp_path / 'work').glob('*.py')
    assert Config.fromfile(written).auto_scale_lr == dict(enable=True, base_batch_size=4096)  # for the next run


def test_auto_scale_lr_needs_to_know_the_batch(tiny_config, run_tool):
    config = tiny_config(dict(auto_scale_lr=None))
    with pytest.raises(
        SystemExit,
        match='error: The config lacks the batch size of its learning rate; set auto_scale_lr.base_batch_size',
    ):
        run_tool('train.py', config, '--auto-scale-lr')


def test_cfg_options_and_default_work_dir(tiny_config, run_tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config({'work_dir': None})
    options = ['train_cfg.max_epochs=1', 'optim_wrapper.optimizer.lr=1e-5', 'param_scheduler=None']
    run_tool('train.py', config, '--cfg-options', *options)
    work_dir = tmp_path / 'work_dirs' / config.stem  # no work_dir in the config or on the command line
    assert (work_dir / 'epoch_1.pth').exists() and not (work_dir / 'epoch_2.pth').exists()
    assert {record['lr'] for record in read_scalars(work_dir)} == {1e-5}


@pytest.mark.slow
def test_test_reports_the_reconstruction_loss(tiny_config, run_tool, tmp_path):
    """It is that of the named checkpoint on whole images: less after three epochs than after one."""
    config = tiny_config(FLOAT32 | {'train_cfg.max_epochs': 3, 'param_scheduler': None})
    run_tool('train.py', config)
    losses = {}
    for epoch in (1, 3):
        checkpoint, work_dir = tmp_path / f'work/epoch_{epoch}.pth', tmp_path / f'test{epoch}'
        run_tool('test.py', config, checkpoint, '--work-dir', work_dir, '--out', work_dir / 'out.pkl')
        (log,) = work_dir.glob('*/*.log')
        losses[epoch] = float(re.search(r'reconstruction/loss: ([\d.]+)', log.read_text())[1])
    assert 0 < losses[3] < 0.95 * losses[1] < 2
    state_dict = torch.load(checkpoint, weights_only=False)['state_dict']
    assert {key.split('.')[0] for key in state_dict} == {'backbone', 'neck'}  # no teacher

    predictions = pickle.loads((work_dir / 'out.pkl').read_bytes())
    assert len(predictions) == 24
    assert all((~sample['mask']).sum() == 4 for sample in predictions)
    assert sum(float(sample['loss']) for sample in predictions) / 24 == pytest.approx(losses[3], abs=1e-4)


def test_test_of_what_is_not_there(tiny_config, run_tool):
    with pytest.raises(SystemExit, match='error: nothing.pth is neither a file nor a URL'):
        run_tool('test.py', tiny_config(), 'nothing.pth')


@pytest.mark.slow
def test_dist_train(tiny_config, tmp_path):
    """Two processes on CPU train an epoch and test together: each sees half of the images."""
    config = tiny_config({'train_cfg.max_epochs': 1, 'param_scheduler': None})
    run_script('dist_train.sh', config, 2, '--auto-scale-lr')
    run_script('dist_test.sh', config, tmp_path / 'work/epoch_1.pth', 2, '--out', tmp_path / 'out.pkl')
    assert len(pickle.loads((tmp_path / 'out.pkl').read_bytes())) == 24
    checkpoint = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 3  # 24 images in batches of 2 x 4
    assert not any(key.startswith('module.') for key in checkpoint['state_dict'])
    assert {record['lr'] for record in read_scalars(tmp_path / 'work')} == {2.4e-3 * 8 / 4096}


@pytest.mark.parametrize('script', sorted((ROOT / 'tools').glob('*.sh')), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    result = subprocess.run(['bash', '-n', script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_scripts_say_how_to_call_them(script):
    result = subprocess.run(['bash', ROOT / 'tools' / script], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith('usage: bash ')
    assert len(result.stderr.splitlines()) == 1
