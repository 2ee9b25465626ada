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
    for name in ('arms', 'report', 'run', 'steps', 'study'):
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
    measures = {measure: accuracy for measure in arms.MEASURES}
    return dict(study='0123', arm=arm, seed=seed, images=1000, gflop_per_image=0.1, measures=measures)


@pytest.mark.slow
def test_runs_measures_and_goes_on(run_tool, photographs, tmp_path):
    options = ['--data', photographs, '--work-dir', tmp_path, '--seeds', 0, '--jobs', 1]
    run_tool('study/study.py', 'run', *options, '--arms', '4 masks, a third, a quarter of the epochs')
    results = tmp_path / 'results.jsonl'
    teacher, run = map(json.loads, results.read_text().splitlines())
    assert teacher['arm'] == 'teacher' and run['seed'] == 0 and run['images'] == 44
    assert {'linear probe', 'k-NN, mean token', 'zero-shot'} <= run['measures'].keys()
    assert run['measures']['linear probe'] > 75 and teacher['measures']['linear probe'] > 75
    assert 'linear probe, semantic-aware' not in run['measures']

    # what is there is kept; another arm is added
    run_tool('study/study.py', 'run', *options, '--arms', 'MILAN')
    again = list(map(json.loads, results.read_text().splitlines()))
    assert again[:2] == [teacher, run] and again[2]['arm'] == 'MILAN'
    assert 'linear probe, semantic-aware' in again[2]['measures']
    run_tool('study/study.py', 'report', '--results', results, '--out', tmp_path)
    assert (tmp_path / 'table.md').read_text().count('\n') == 5
    assert cv2.imread(str(tmp_path / 'accuracy.png')).std() > 1


def test_table_marks_what_differs(study):
    _, arms, report = study
    lines = [line(arms, 'MILAN', seed, 50 + seed) for seed in range(3)]
    lines += [line(arms, 'MAE', seed, 40.1 + 1.1 * seed) for seed in range(3)]
    lines += [line(arms, 'distillation', seed, accuracy) for seed, accuracy in enumerate((53, 49, 52))]
    table = report.markdown(lines).splitlines()
    assert table[2].startswith('| MAE | 3 | 0.10 | 41.2 ± 1.1 - |')
    assert table[3].startswith('| MILAN | 3 | 0.10 | 51.0 ± 1.0 |')
    assert table[4].startswith('| distillation | 3 | 0.10 | 51.3 ± 2.1 |')


def test_published_results_are_of_this_study(study):
    """The published lines cover every arm and seed, and give the table in docs/reproduction.md."""
    tool, arms, report = study
    lines = tool.read_results(ROOT / 'docs/reproduction/results.jsonl')
    assert {(line['arm'], line['seed']) for line in lines} == {('teacher', 0)} | {
        (arm, seed) for arm in arms.ARMS for seed in arms.SEEDS
    }
    assert report.markdown(lines) in (ROOT / 'docs/reproduction.md').read_text()


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'configs/study').glob('m*.py')))
def test_configs_state_their_difference(name, study):
    _, arms, _ = study
    path = ROOT / 'configs/study' / name
    assert path.read_text().startswith('# ')
    assert name in arms.ARMS.values()
    own = own_settings(path)
    base = own.pop('_base_')
    inherited = Config.fromfile(path.parent / (base if isinstance(base, str) else base[0]))
    assert not list(restated(own, inherited.to_dict()))


def test_arms_are_what_their_names_say(study):
    """Arms have the same steps and masked views; alignment has half the steps."""
    _, arms, _ = study
    views = {}
    for arm in arms.ARMS:
        cfg = arms.read_arm(arm)
        masks, batch = cfg.model.get('masks_per_image', 1), cfg.train_dataloader.batch_size
        views[arm] = masks * batch, cfg.train_cfg.max_epochs * masks
        assert cfg.param_scheduler[-1].end == (520 if arm.startswith('alignment') else 1040)
        assert abs(4166 // batch * cfg.train_cfg.max_epochs - cfg.param_scheduler[-1].end) <= 1
    assert views.pop('alignment, half the epochs') == (16, 2)
    assert set(views.values()) == {(16, 4)}


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
    with pytest.raises(SystemExit, match="The study has no arm 'MILLAN'; choose one of 'MAE', "):
        run_tool('study/study.py', 'run', '--data', photographs, '--work-dir', tmp_path, '--arms', 'MILLAN')


def test_results_of_another_study(study, run_tool, photographs, tmp_path):
    _, arms, _ = study
    path = tmp_path / 'results.jsonl'
    path.write_text(json.dumps(line(arms, 'MAE', 0, 1.0)) + '\n')
    with pytest.raises(SystemExit, match='line 1, is of study 0123, not of .*; name another file'):
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
