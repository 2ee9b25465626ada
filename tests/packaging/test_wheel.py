"""The wheel: its files, and its configs as bases of other projects."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from helpers import ROOT

SOURCES = ('setup.py', 'pyproject.toml', 'README.md', 'model-index.yml', 'configs', 'tools', 'mmmilan')
FIND = """
import json, sys
import mmengine.hub
import mmmilan
from mmmilan.checkpoints.zoo import zoo_models
from mmengine.config import Config

name = 'milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
inherited, found = Config.fromfile('own.py'), mmengine.hub.get_config(f'mmmilan::{name}')
print(json.dumps(dict(
    package=mmmilan.__file__,
    configs=[str(model.config) for model in zoo_models().values()],
    ratio=inherited.model.masking.pop('mask_ratio'),
    found=found.filename,
    inherited=inherited.model.to_dict(),
    scope=inherited.default_scope,
)))
"""


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    """A folder in which pip installed the wheel without its dependencies."""
    source, site = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('site')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', '--quiet', 'install', '--no-deps', '--no-build-isolation', '--no-index']
    subprocess.run([*pip, '--target', site, source], check=True)
    return site


@pytest.mark.slow
def test_files_in_the_wheel(site):
    """All configs and every tool that needs no checkout around it: no demo, no study, nothing that measures."""
    mim = site / 'mmmilan/.mim'
    assert not any(path.is_symlink() for path in mim.rglob('*'))
    for folder, pattern in (('configs', '**/*.py'), ('configs', '**/*.yml'), ('tools', '*.py')):
        expected = {path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern)}
        assert {path.relative_to(mim) for path in (mim / folder).rglob('*') if path.match(pattern)} == expected
    assert {path.name for path in (mim / 'tools').iterdir() if path.is_dir()} <= {'__pycache__'}  # pip's
    assert {path.name for path in mim.rglob('*.sh')} == {'dist_train.sh', 'dist_test.sh', 'slurm_train.sh'}


@pytest.mark.slow
def test_configs_are_bases_of_other_projects(site, tmp_path):
    """``_base_ = 'mmmilan::…'`` gives the same config as its path; mmengine.hub finds it too."""
    config = 'milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
    (tmp_path / 'own.py').write_text(f"_base_ = 'mmmilan::{config}'\nmodel = dict(masking=dict(mask_ratio=0.6))\n")
    environment = os.environ | dict(PYTHONPATH=str(site))
    run = subprocess.run([sys.executable, '-c', FIND], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen['package'] == str(site / 'mmmilan/__init__.py')
    assert seen['configs'] and all(path.startswith(str(site)) and Path(path).is_file() for path in seen['configs'])
    assert seen['found'] == str(site / 'mmmilan/.mim/configs' / config)
    expected = Config.fromfile(ROOT / 'configs' / config)
    del expected.model.masking['mask_ratio']
    assert seen['ratio'] == 0.6 and seen['scope'] == expected.default_scope
    assert seen['inherited'] == expected.model.to_dict()  # no `_scope_` in it, which would hide mmpretrain's types
