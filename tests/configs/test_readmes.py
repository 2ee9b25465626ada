"""The READMEs of the folders of configs: in mmpretrain's form, links lead to files, tables are those of metafiles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from helpers import ROOT
from mmmilan.checkpoints.zoo import zoo_models

CONFIGS = ROOT / 'configs'
FOLDERS = sorted({path.parent for path in CONFIGS.rglob('*.py')} - {CONFIGS / '_base_'})
METHODS = [CONFIGS / name for name in ('milan', 'maskclip', 'detection', 'segmentation')]
PAGES = [folder / 'README.md' for folder in FOLDERS] + [ROOT / 'docs/recipes.md']


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_and_commands(page):
    text = page.read_text()
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)\s]+)\)', text) if not link.startswith('http')]
    links += re.findall(r'<img src="([^"]+)"', text)
    paths = [page.parent / link for link in links]
    paths += [ROOT / path for path in re.findall(r'(?:tools|configs)/[\w./-]+\.(?:py|sh)', text)]
    assert paths and all(path.exists() for path in paths), [str(path) for path in paths if not path.exists()]
    named = re.findall(r"(?:Predictor|get_model|FeatureExtractor)\('([\w-]+)'", text)
    assert set(named) <= set(zoo_models())


@pytest.mark.parametrize('folder', FOLDERS, ids=name_of)
def test_sections(folder):
    """mmpretrain's, in its order; what belongs to a method stands in the README of its folder, and others link it."""
    text = (folder / 'README.md').read_text()
    headings = re.findall(r'^#+ .+', text, re.MULTILINE)
    assert headings[0].startswith('# ')
    wanted = ['## How to use it?', '## Models and results']
    if folder in METHODS:
        wanted = ['## Abstract', *wanted, '## Citation']
        assert re.search(r'^> \[.+\]\(https://arxiv.org/abs/\d{4}\.\d{5}\)', text, re.MULTILINE)
        assert '<img src=' in text and '```bibtex' in text and '**Train/Test Command**' in text
    else:
        assert '../README.md' in text or '../../docs/' in text
    assert [heading for heading in headings if heading in wanted] == wanted
    for config in folder.glob('*.py'):
        assert f'({config.name})' in text, config.name


@pytest.mark.parametrize('metafile', sorted(CONFIGS.rglob('metafile.yml')), ids=name_of)
def test_table_is_that_of_the_metafile(metafile):
    text = (metafile.parent / 'README.md').read_text()
    assert model_table(metafile) in text, f'put this table into the README:\n{model_table(metafile)}'


def model_table(metafile: Path) -> str:
    """The models of a metafile as a table of its README; results are published ones, with the place of each."""
    rows = ['| Model | Params (M) | FLOPs (G) | Published | Config | Download |', '|---|---|---|---|---|---|']
    for model in yaml.safe_load(metafile.read_text())['Models']:
        size = f'{model["Metadata"]["Parameters"] / 1e6:.2f} | {model["Metadata"]["FLOPs"] / 1e9:.2f}'
        results = '; '.join(map(published, model['Results'] or [])) or '–'
        weights = f'[model]({model["Weights"]})' if model.get('Weights') else '–'
        config = f'[config]({(ROOT / model["Config"]).name})'
        rows.append(f'| `{model["Name"]}` | {size} | {results} | {config} | {weights} |')
    return '\n'.join(rows) + '\n'


def published(result: dict) -> str:
    """A result in a cell, such as 'COCO box AP 52.6 (table 3)'."""
    source = result['Source'].removeprefix('arXiv 2208.06049, ').partition(',')[0]
    numbers = ', '.join(
        f'{metric.replace("Top 1 Accuracy", "top-1")} {value}' for metric, value in result['Metrics'].items()
    )
    return f'{result["Dataset"]} {numbers} ({source})'
