"""The commands in configs/milan/README.md: one for each row of the paper's tables, with a config that fits the row."""

from __future__ import annotations

import re

import pytest
import yaml
from mmengine.config import Config

from helpers import ROOT, rest_slow

FOLDER = ROOT / 'configs/milan'
ROW = re.compile(r'\| (\d+) \| (.+?) \| \[`(.+?)`\]\((.+?)\) \| \[.+?\]\((.+?)\) \| (.+?) \|')
ROWS = [match.groups() for match in map(ROW.fullmatch, (FOLDER / 'README.md').read_text().splitlines()) if match]
# The figures of MILAN and its variants in the paper, table by table, from the top
FIGURES = {
    1: '85.4 87.8 86.4 88.3',
    2: '79.9 84.3',
    3: '52.6/45.5 55.9/48.2 52.7 57.9',
    4: '62.2 75.9 64.1 76.6 46.3 57.4',
    5: '83.0 83.6 83.9 83.0 83.3 83.3 84.1 85.1 85.4 85.6 84.4',
    6: '48.1 49.2 50.4 51.9 52.7',
    7: '62.0 67.1 68.1 79.9 78.9 80.0',
    8: '78.9 79.9 84.1 84.3',
    9: '86.7 81.6 55.0/47.5 55.3 87.8 84.3¹ 55.9/48.2 57.9',
    10: '84.0 85.4',
}
QUOTED = {1: '82.1 85.3', 2: '66.5 70.5'}  # CLIP itself
SECTIONS = {('section 3.4', '82.6')}  # SLIP itself
# target, decoder and masking of a row's pretraining, by words in the row's name
STARTS = {
    '#1': ('PixelTarget', 'MAEDecoder', 'RandomMasking'),
    '#2 CLIP target': ('CLIPTarget', 'MAEDecoder', 'RandomMasking'),
    '#3 prompting decoder': ('PixelTarget', 'PromptingDecoder', 'RandomMasking'),
    '#4 semantic sampling': ('PixelTarget', 'MAEDecoder', 'SemanticAwareMasking'),
    '#5 both': ('PixelTarget', 'PromptingDecoder', 'SemanticAwareMasking'),
    'CLIP target, semantic sampling': ('CLIPTarget', 'MAEDecoder', 'SemanticAwareMasking'),
    'CLIP target, prompting decoder': ('CLIPTarget', 'PromptingDecoder', 'RandomMasking'),
    'all three': ('CLIPTarget', 'PromptingDecoder', 'SemanticAwareMasking'),
    'random sampling': ('CLIPTarget', 'PromptingDecoder', 'RandomMasking'),
    'distillation': ('CLIPTarget', 'LinearProjection', 'SemanticAwareMasking'),
}


def test_every_row_of_the_paper_is_there():
    found = {table: [] for table in FIGURES}
    for table, *_, figure in ROWS:
        found[int(table)].append(figure.replace(' ', ''))
    assert found == {table: figures.split() for table, figures in FIGURES.items()}


def test_metafiles_quote_the_paper():
    """Each result names its source, and the figure is in that table."""
    metafiles = [yaml.safe_load(path.read_text()) for path in (ROOT / 'configs').rglob('metafile.yml')]
    results = [result for each in metafiles for model in each['Models'] for result in model['Results'] or []]
    figures = [(each['Source'], f'{value:.1f}') for each in results for value in each['Metrics'].values()]
    of_the_paper = [(source.partition(', ')[2], value) for source, value in figures if '2208.06049' in source]
    assert len(of_the_paper) == len(figures) - 2  # OpenMMLab's own
    assert {each for each in of_the_paper if 'section' in each[0]} == SECTIONS
    of_tables = [(int(place.removeprefix('table ')), value) for place, value in of_the_paper if 'table' in place]
    for table, value in of_tables:
        assert value in f'{FIGURES[table]} {QUOTED.get(table)}'.replace('/', ' ').split(), (table, value)
    assert {figure for figure in figures if '2208.06049' not in figure[0]} == {
        ('OpenMMLab, mmpretrain/configs/milan', value) for value in ('85.3', '78.9')
    }


QUICK = {  # each start once, and each recipe of what follows
    ('1', 'ViT-L, 384 px'),
    ('2', 'ViT-B'),
    ('3', 'ViT-B, COCO'),
    ('4', 'ViT-B, Rendition'),
    ('5', '#1, 1600 epochs'),
    ('5', '#2 CLIP target'),
    ('5', '#3 prompting decoder'),
    ('5', '#4 semantic sampling'),
    ('5', '#5 both'),
    ('6', '#3 CLIP target, semantic sampling'),
    ('7', '#6 #5, semantic-aware probing'),
    ('9', 'CLIP ViT-B, LP'),
    ('10', 'knowledge distillation'),
}


@pytest.mark.parametrize(
    'row',
    rest_slow(ROWS, *[row for row in ROWS if row[:2] in QUICK]),
    ids=[f'{row[0]}-{row[1]}' for row in ROWS],
)
def test_row(row, monkeypatch):
    table, name, pretrain, start, downstream, _ = row
    assert (FOLDER / start).stem == pretrain
    pretraining = Config.fromfile(FOLDER / start)
    parts = tuple(pretraining.model[key].type.removeprefix('mmmilan.') for key in ('head', 'neck', 'masking'))
    expected = next((parts for words, parts in STARTS.items() if words in name), STARTS['all three'])
    assert parts == (STARTS['random sampling'] if table == '2' else expected)
    if table == '9':  # the teacher's size is the row's
        assert pretraining.model.head.teacher.model == ('ViT-B-16' if 'ViT-B' in name else 'ViT-L-14') + '-quickgelu'
    assert pretraining.train_cfg.max_epochs == (1600 if '1600' in name else 400)

    monkeypatch.setenv('PRETRAIN', pretrain)
    cfg = Config.fromfile(FOLDER / downstream)
    assert cfg.model.backbone.init_cfg.checkpoint == pretrain
    assert cfg.model.backbone.arch == pretraining.model.backbone.arch == ('large' if 'large' in pretrain else 'base')
    if 'ViT-L' in name or 'ViT-B' in name and table != '9':
        assert ('large' in pretrain) == ('ViT-L' in name)
