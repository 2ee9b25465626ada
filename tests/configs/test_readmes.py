"""The READMEs of the folders of configs: every link and command leads to a file."""

from __future__ import annotations

import re

import pytest

from helpers import ROOT

README = [ROOT / 'configs' / name / 'README.md' for name in ('milan', 'milan/benchmarks', 'detection', 'segmentation')]
README += [ROOT / 'configs/maskclip/README.md', ROOT / 'docs/recipes.md']


@pytest.mark.parametrize('readme', README, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_commands(readme):
    text = readme.read_text()
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)\s]+)\)', text) if not link.startswith('http')]
    paths = [readme.parent / link for link in links]
    paths += [ROOT / path for path in re.findall(r'(?:tools|configs)/[\w./-]+\.(?:py|sh)', text)]
    assert paths and all(path.exists() for path in paths), [str(path) for path in paths if not path.exists()]
