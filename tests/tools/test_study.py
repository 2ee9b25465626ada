"""The study: it trains, measures, resumes and reports; its arms differ in what their names say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from helpers import ROOT, own_settings, restated
from mmmilan.models import MILAN
from mmmilan.registry import MODELS

STUDY = ROOT / 'tools/study'


@pytest.fixture
def study(monkeypatch):
    """The tool's modules."""
    monkeypatch.syspath_prepend(str(STUDY))
    import arms
    import report
    import study

    yield study, arms, report
    for name in ('arms', 'rates', 'report', 'run', 'steps', 'study'):
        sys.modules.pop(name, None)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory) -> Path:
    """520 training and 40 test images of two classes, bright above or below."""
    root, rng = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
    for split, count in (('train', 260), ('test', 20)):
        for label, name in enumerate(('above', 'below')):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 150, (32, 32, 3), dtype=np.uint8)
                image[16 * label : 16 * label + 16] += 100
                cv2.imwrite(str(root / split / name / f'{i:03}.png'), image)
    return root


def line(arms, arm: str, seed: int, accuracy: float) -> dict:
    """A line of results, of another study."""
    training = dict(images=1000, epochs=2, cpu_seconds=100 + seed, resumed=seed == 2, gflop_per_image=0.1)
    curve = [{'epoch': epoch, 'linear probe': accuracy - 2 + epoch} for epoch in (1, 2)]
    measures = {measure: accuracy for measure in arms.MEASURES}
    return dict(study='0123', arm=arm, seed=seed, budget='long', **training, curve=curve, measures=measures)


@pytest.mark.slow
def test_runs_measures_and_goes_on(study, run_tool, photographs, tmp_path):
    options = ['--data', photographs, '--work-dir', tmp_path, '--seeds', 0, '--jobs', 1, '--budget', 'short']
    run_tool('study/study.py', 'run', *options, '--arms', 'LightlyTrain, distillation')  # which is not there
    results = tmp_path / 'results.jsonl'
    teacher = json.loads(results.read_text())
    assert teacher['arm'] == 'teacher' and teacher['measures']['linear probe'] > 75

    # what is there is kept; another arm is added
    run_tool('study/study.py', 'run', *options, '--arms', 'MILAN')
    again, run = map(json.loads, results.read_text().splitlines())
    assert again == teacher
    assert (run['arm'], run['seed'], run['images'], run['epochs'], run['resumed']) == ('MILAN', 0, 176, 4, False)
    assert run['measures'].keys() == set(study[1].MEASURES)
    assert run['measures']['linear probe'] > 75
    assert [point['epoch'] for point in run['curve']] == [1, 2, 4]
    assert all(point['linear probe'] > 60 for point in run['curve'])
    run_tool('study/study.py', 'report', '--results', results, '--out', tmp_path, '--budget', 'short')
    assert (tmp_path / 'table.md').read_text().count('\n') == 4
    assert cv2.imread(str(tmp_path / 'curves.png')).std() > 1


def test_table_marks_what_differs(study):
    _, arms, report = study
    lines = [line(arms, 'MILAN', seed, 50 + seed) for seed in range(3)]
    lines += [line(arms, 'MAE', seed, 40.1 + 1.1 * seed) for seed in range(3)]
    lines += [line(arms, 'distillation', seed, accuracy) for seed, accuracy in enumerate((53, 49, 52))]
    table = report.markdown(lines).splitlines()
    assert table[2].startswith('| MAE | 3 | 0.1 | 41.2 ± 1.1 - |')
    assert table[3].startswith('| MILAN | 3 | 0.1 | 51.0 ± 1.0 |')
    assert table[4].startswith('| distillation | 3 | 0.1 | 51.3 ± 2.1 |')
    assert report.curve_of(lines, 'MILAN', 'linear probe') == [(50, 50), (100, 51)]  # seconds of seed 0
    assert report.drawn(lines) == ['MAE', 'MILAN', 'distillation']
    assert report.drawn(lines[:1]) == list(arms.ARMS)


def test_rates_are_compared_within_a_cell(study):
    import rates

    def run(cell: str, rate: float, accuracy: float) -> dict:
        options = dict(recipe='milan', img_size=32, mask_ratio=None, cls_token=None, start=None, seed=0)
        return dict(cell=cell, rate=rate, measures=dict.fromkeys(rates.SHOWN, accuracy)) | options

    lines = [run('4-96/16/500', 1e-3, 44), run('4-96/16/500', 1.5e-4, 41.5), run('4-96/64/500', 1e-3, 40)]
    rows = rates.table(lines).splitlines()[2:]
    assert [row.split(' | ')[6] for row in rows] == ['0.00015', '0.001', '0.001']
    assert [row.split(' | ')[-1] for row in rows] == ['-2.5 |', '0.0 |', '0.0 |']


def test_published_results_are_of_this_study(study):
    """The published lines give the tables in docs/reproduction.md, which say how many of the runs there are."""
    tool, arms, report = study
    lines = tool.read_results(ROOT / 'docs/reproduction/results.jsonl')
    for budget in arms.BUDGETS:
        of_budget = [line for line in lines if line['budget'] == budget]
        runs = {(line['arm'], line['seed']) for line in of_budget}
        assert len(runs) == len(of_budget)
        assert runs <= {('teacher', 0)} | {(arm, seed) for arm in arms.ARMS for seed in arms.SEEDS}
        assert not of_budget or report.markdown(of_budget) in (ROOT / 'docs/reproduction.md').read_text()


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'configs/study').glob('[lm]*.py')))
def test_configs_state_their_difference(name, study):
    _, arms, _ = study
    path = ROOT / 'configs/study' / name
    assert path.read_text().startswith('# ')
    assert name in arms.ARMS.values()
    own = own_settings(path)
    base = own.pop('_base_')
    inherited = Config.fromfile(path.parent / (base if isinstance(base, str) else base[0]))
    assert not list(restated(own, inherited.to_dict()))


@pytest.mark.slow
def test_arms_have_the_same_steps_and_images(study):
    """Except alignment, with half the steps, and LightlyTrain; the long budget has ten times the short one's."""
    _, arms, _ = study
    steps = {}
    for budget in arms.BUDGETS.values():
        images = len(range(50000)[budget.images])
        for arm in arms.ARMS:
            cfg = arms.read_arm(arm)
            batch = cfg.train_dataloader.batch_size
            assert batch == 16
            assert cfg.train_cfg.max_epochs == {
                arms.LIGHTLY: 2.8,
                'alignment, half the epochs': 2,
                'MILAN, few-images, one crop, half the epochs': 2,
            }.get(arm, 4)
            arms.set_schedule(cfg, images, budget)
            assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_epochs * (images // batch)
            if arm == 'MILAN':
                steps[images] = cfg.param_scheduler[-1].end
    assert steps == {25000: 10934, 4167: 1040}


def test_class_token_weighs_a_third(study):
    _, arms, _ = study
    for arm in arms.PAPER:
        head = arms.read_arm(arm).model.head
        assert head.get('cls_token') == (32 if arm.endswith(('class token 32', 'few-images')) else None)


@pytest.mark.slow
def test_every_arm_takes_a_step(study, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(STUDY))
    import steps

    _, arms, _ = study
    steps.save_random_teacher(str(tmp_path / 'teacher.pth'))
    for arm in arms.ARMS:
        cfg = arms.read_arm(arm)
        if cfg.model.head.get('teacher'):
            cfg.model.head.teacher.pretrained = str(tmp_path / 'teacher.pth')
        model = MODELS.build(cfg.model)
        model.init_weights()
        assert isinstance(model, MILAN)
        assert torch.isfinite(model.loss(torch.randn(2, 3, 32, 32))['loss'])


# -- bad input


def test_arm_that_does_not_exist(run_tool, photographs, tmp_path):
    with pytest.raises(SystemExit, match="The study has no arm 'MILLAN'; choose one of 'no pretraining', 'MAE', "):
        run_tool('study/study.py', 'run', '--data', photographs, '--work-dir', tmp_path, '--arms', 'MILLAN')


def test_cell_that_is_none(run_tool, tmp_path):
    with pytest.raises(
        SystemExit, match='The cell 96/16 is not ENCODER/BATCH/IMAGES, such as 4-96/16/4167; correct it'
    ):
        run_tool('study/rates.py', '--data', tmp_path, '--work-dir', tmp_path, '--cells', '96/16')


def test_results_of_another_study(study, run_tool, photographs, tmp_path):
    _, arms, _ = study
    path = tmp_path / 'results.jsonl'
    path.write_text(json.dumps(line(arms, 'MAE', 0, 1.0)) + '\n')
    with pytest.raises(SystemExit, match='line 1, MAE, is of another study .*; name another file'):
        run_tool('study/study.py', 'run', '--data', photographs, '--work-dir', tmp_path)
    path.write_text('{"arm": "MA')
    with pytest.raises(SystemExit, match='line 1, is not complete JSON; remove the line'):
        run_tool('study/study.py', 'report', '--results', path, '--out', tmp_path)
    path.write_text('')
    with pytest.raises(SystemExit, match='holds no run of an arm; run the study first'):
        run_tool('study/study.py', 'report', '--results', path, '--out', tmp_path)


def test_data_that_is_not_there(run_tool, tmp_path):
    with pytest.raises(SystemExit, match='The folder .*nowhere/train does not exist; --data needs train/CLASS'):
        run_tool('study/study.py', 'run', '--data', tmp_path / 'nowhere', '--work-dir', tmp_path)
