"""A run that was killed and resumed ends with the weights of an uninterrupted one, bit by bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, assert_identical, load_trusted, read_scalars

KILL_HOOK = """
import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 8:  # in the second epoch of 6 steps
            os.kill(os.getpid(), signal.SIGKILL)
"""


def start(config: Path, work_dir: Path, path: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / 'tools/train.py', config, '--work-dir', work_dir]
    environment = os.environ | dict(PYTHONPATH=f'{path}:{ROOT}', OMP_NUM_THREADS='1')
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_and_resumed(tiny_config, run_tool, tmp_path):
    (tmp_path / 'kill_hook.py').write_text(KILL_HOOK)
    changes = dict(custom_imports=dict(imports=['kill_hook'], allow_failed_imports=False))
    changes['default_hooks.kill'] = dict(type='KillHook')
    persistent = {'train_dataloader.persistent_workers': True}
    killed = start(tiny_config(changes | persistent), tmp_path / 'killed', tmp_path)
    uninterrupted = start(tiny_config(persistent), tmp_path / 'uninterrupted', tmp_path)
    assert uninterrupted.wait() == 0
    expected = load_trusted(tmp_path / 'uninterrupted/epoch_2.pth')
    assert killed.wait() == -signal.SIGKILL
    assert (tmp_path / 'killed/last_checkpoint').read_text().endswith('epoch_1.pth')

    shutil.copytree(tmp_path / 'killed', tmp_path / 'other')
    run_tool('train.py', tiny_config(), '--work-dir', tmp_path / 'killed', '--resume')
    assert_identical(load_trusted(tmp_path / 'killed/epoch_2.pth'), expected)

    # what a sample looks like does not depend on the worker that reads it; the checkpoint by name this time
    config = tiny_config({'train_dataloader.num_workers': 1})
    run_tool('train.py', config, '--work-dir', tmp_path / 'other', '--resume', tmp_path / 'other/epoch_1.pth')
    assert_identical(load_trusted(tmp_path / 'other/epoch_2.pth'), expected)
    with pytest.raises(AssertionError):
        assert_identical(load_trusted(tmp_path / 'other/epoch_1.pth'), expected)


def test_steps_and_epochs_differ(tiny_config, run_tool, tmp_path):
    """Equality above is not for want of randomness: with weights that stand still, no two losses are the same."""
    run_tool('train.py', tiny_config({'optim_wrapper.optimizer.lr': 0.0, 'optim_wrapper.type': 'OptimWrapper'}))
    losses = [record['loss'] for record in read_scalars(tmp_path / 'work')]
    assert len(losses) == len(set(losses)) == 12
