"""``tools/slurm_train.sh`` with stand-ins for Slurm's commands that record how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT

SRUN = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "{folder}/srun"\nexit {status}\n'
SCONTROL = '#!/usr/bin/env bash\necho "$@" > "{folder}/scontrol"\n'


def start(folder: Path, status: int, **environment: str) -> tuple[int, list[str], str]:
    """Run the script; returns its exit status and the arguments of ``srun`` and ``scontrol`` ('' if not called)."""
    commands = folder / 'bin'
    commands.mkdir()
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (commands / name).write_text(text.format(folder=folder, status=status))
        (commands / name).chmod(0o755)
    environment = os.environ | dict(PATH=f'{commands}:{os.environ["PATH"]}', GPUS='4') | environment
    command = ['bash', ROOT / 'tools/slurm_train.sh', 'gpu', 'milan', 'config.py', 'work', '--amp']
    code = subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False).returncode
    called = folder / 'scontrol'
    return code, (folder / 'srun').read_text().split(), called.read_text().strip() if called.exists() else ''


def test_what_srun_is_asked_for(tmp_path):
    code, arguments, requeued = start(tmp_path, 0, SRUN_ARGS='--qos=low --time=3')
    assert code == 0 and not requeued
    assert {'--ntasks=4', '--gres=gpu:4', '--qos=low', '--time=3'} <= set(arguments)
    assert arguments[-6:] == ['config.py', '--work-dir', 'work', '--launcher', 'slurm', '--amp']


@pytest.mark.parametrize(
    ('status', 'environment', 'expected'),
    [
        (75, dict(SLURM_JOB_ID='17'), 'requeue 17'),
        (75, {}, ''),  # on a terminal there is no job to put back
        (1, dict(SLURM_JOB_ID='17'), ''),
        (0, dict(SLURM_JOB_ID='17'), ''),
    ],
)
def test_a_run_to_be_resumed_is_requeued(tmp_path, status, environment, expected):
    code, _, requeued = start(tmp_path, status, **environment)
    assert (code, requeued) == (status, expected)


def test_a_job_that_begins_again_resumes(tmp_path):
    _, arguments, _ = start(tmp_path, 0, SLURM_JOB_ID='17', SLURM_RESTART_COUNT='1')
    assert arguments[-2:] == ['--amp', '--resume']
