"""What the pages name exists: files, tests, and the hooks of a run in the order in which they are called."""

from __future__ import annotations

import re

from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from helpers import ROOT


def test_the_table_of_hooks_is_that_of_a_run(tiny_config):
    """As the runner of the published config sorts them; online evaluation is pretrain's."""
    page = (ROOT / 'docs/architecture.md').read_text().split('## Every hook')[1]
    table = re.findall(r'^\| `(\w+)` \|', page, re.M)
    runtime = Config.fromfile(ROOT / 'configs/_base_/default_runtime.py')
    evaluation = dict(type='mmmilan.OnlineEvaluationHook', dataset={})
    cfg = Config.fromfile(tiny_config())
    cfg.update(default_hooks=runtime.default_hooks, custom_hooks=[*runtime.custom_hooks, evaluation])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        hooks = [type(hook).__name__ for hook in Runner.from_cfg(cfg).hooks]
    assert table == hooks


def test_modules_that_the_page_names_exist():
    page = (ROOT / 'docs/architecture.md').read_text()
    paths = [path for path in re.findall(r'`([\w/]+\.py)`', page) if not path.startswith('config')]
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / 'mmmilan' / path).exists() and not (ROOT / path).exists()]
    assert re.findall(r'`(\w+/)`', page)


def test_files_and_tests_that_pages_name_exist():
    pages = [path.read_text() for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'))]
    files = re.findall(r'`((?:configs|docs|mmmilan|tests|tools)/[\w./-]+\.(?:md|npz|py|sh))`', '\n'.join(pages))
    assert len(files) > 20
    assert not [path for path in files if not (ROOT / path).is_file()]
    tests = re.findall(r'`(test_\w+)`', '\n'.join(pages))
    written = '\n'.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    assert tests
    assert not [name for name in tests if f'def {name}(' not in written]
