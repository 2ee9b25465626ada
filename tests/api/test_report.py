"""The report page, which says whether pretraining helped."""

from __future__ import annotations

import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

import mmmilan
from mmmilan.errors import InputError
from mmmilan.evaluation.comparison import Accuracy, few_labels, hold_out, most_frequent, score_encoders, verdict
from mmmilan.evaluation.probes import rankme
from mmmilan.visualization.page import Page, best_cells
from mmmilan.visualization.pictures import nearest_neighbours, read_scalars


def test_from_a_run_to_a_page(image_folder, quick, tmp_path):
    quick['epochs'] = 1
    first = mmmilan.pretrain(image_folder, tmp_path / 'a', **quick)
    second = mmmilan.pretrain(image_folder, tmp_path / 'b', start=str(first), **quick)
    page = mmmilan.report(image_folder, second, tmp_path / 'report.html', compare=first).read_text()
    verdicts = re.findall(r'class="verdict">(Pretraining [^<]+)', page)
    assert len(verdicts) == 1 and 'with starting point' in verdicts[0] and '95 % interval' in verdicts[0]
    for name in ('pretrained', 'pretrained: a/milan', 'starting point', 'random weights', 'teacher'):
        for row in (name, f'{name}, mean token'):
            assert re.search(rf'<td>{row}</td><td>(<b>)?[\d.]+(</b>)?<small>[\d.]+ to [\d.]+</small>', page), row
    assert 'The encoder called pretrained is that of b/milan.' in page
    assert re.search(
        r'<p class="note">k-NN gets [\d.]+ % of 8 images right against [\d.]+ % with pretrained: a/milan', page
    )
    rows = [re.search(rf'<td>{name}</td>(.*?)</tr>', page)[1] for name in ('pretrained: a/milan', 'starting point')]
    assert re.sub('</?b>', '', rows[0]) == re.sub('</?b>', '', rows[1])  # the second run started at the first
    assert 'The captions name the classes' in page and '<small>class0</small>' in page
    assert 'name="viewport"' in page and 'prefers-color-scheme: dark' in page and 'alt=""' not in page
    assert 'It took' in page and page.count('<svg') == 7 and 'href="https://arxiv.org/abs/2208.06049"' in page

    flat = image_folder / 'class0'
    with pytest.raises(InputError, match='holds 8 images'):
        mmmilan.report(flat, second, tmp_path / 'flat.html')
    photos = tmp_path / 'photos'
    photos.mkdir()
    for path in image_folder.glob('*/*/*.jpg'):
        shutil.copy(path, photos)
    page = mmmilan.report(photos, first, tmp_path / 'flat.html').read_text()
    assert 'no figure here can say whether pretraining helped' in page and 'RankMe went from' in page
    assert 'The captions name the classes' not in page


def test_verdict_follows_the_figures():
    rng = np.random.default_rng(0)
    better, worse = Accuracy(rng.random(300) < 0.8), Accuracy(rng.random(300) < 0.5)
    assert verdict(better, worse, 'random weights', 'k-NN').startswith('Pretraining helped: k-NN gets ')
    assert verdict(worse, better, 'random weights', 'k-NN').startswith('Pretraining did harm')
    assert verdict(better, better, 'random weights', 'k-NN').startswith('Pretraining made no difference')
    low, high = better.interval
    error = 196 * np.sqrt(better.value / 100 * (1 - better.value / 100) / 300)  # the normal approximation
    assert low == pytest.approx(better.value - error, abs=1) and high == pytest.approx(better.value + error, abs=1)


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    good = np.eye(4)[labels] + 0.3 * rng.standard_normal((200, 4))
    train, test = hold_out(labels)
    features = dict(good=good.astype(np.float32), noise=rng.standard_normal((200, 4)))
    parts = ({name: rows[part] for name, rows in features.items()} for part in (train, test))
    scores = score_encoders(next(parts), labels[train], next(parts), labels[test])
    assert len(test) == 60 and np.bincount(labels[test]).tolist() == [15] * 4
    assert scores['good']['k-NN'].value > 85 > 45 > scores['noise']['k-NN'].value
    assert scores['good']['probe, all'].value >= scores['good']['probe, 1 % of labels'].value > 40
    assert len(few_labels(np.arange(200), labels, 0.01)) == 4 and len(few_labels(np.arange(200), labels, 0.1)) == 20
    unit = good / np.linalg.norm(good, axis=1, keepdims=True)
    expected = KNeighborsClassifier(5).fit(unit, labels).kneighbors(unit[:3], return_distance=False)[:, 1:]
    assert np.array_equal(nearest_neighbours(good, np.arange(3), 4), expected)


def test_the_most_frequent_class():
    label, alone = most_frequent(np.array([2, 0, 2, 1]), np.array([0, 2, 2, 2, 1]))
    assert label == 2 and alone.value == 60


def test_the_training_split_is_the_bank(image_folder, quick, tmp_path, capfd):
    """All images of ``val`` are asked, which may lack a class; nothing of MMEngine's parameters is printed."""
    data = tmp_path / 'data'
    for split, names in dict(Train=('class0', 'class1', 'class2'), val=('class0', 'class2')).items():
        for name in names:
            shutil.copytree(image_folder / name, data / split / name)
    weights = mmmilan.pretrain(data, tmp_path / 'run', **quick | dict(epochs=1))
    capfd.readouterr()
    page = mmmilan.report(data, weights, tmp_path / 'report.html').read_text()
    assert 'on 16 images, with 95 % confidence intervals' in page
    assert f'among 24 labelled images of {data}/Train' in page
    assert re.search(r'k-NN gets [\d.]+ % of 16 images right .*, class0, is right for 50.0 %\.', page)
    assert re.search(r'<td>always class0</td><td>(<b>)?50.0', page) and '<small>class2</small>' in page
    printed = capfd.readouterr()
    assert len((printed.out + printed.err).splitlines()) < 12
    (data / 'val/class0').rename(data / 'val/other')
    with pytest.raises(
        InputError, match=r'val/? has 1 of its 2 classes, other \(8 samples\), where .*Train/? has class0'
    ):
        mmmilan.report(data, weights, tmp_path / 'other.html')


def test_rankme():
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.standard_normal((100, 8)))[0]
    assert rankme(orthogonal) == pytest.approx(8, abs=1e-2)
    assert rankme(np.outer(rng.random(100), rng.random(8))) == pytest.approx(1, abs=1e-2)
    assert 1 < rankme(orthogonal * np.array([5, 5, 5, 1, 1, 1, 1, 1])) < 8


def test_bold_is_the_best_whichever_row_it_is_in():
    assert best_cells([[1.0, 5.0, None], [2.0, 5.0, 1.0], [0.5, 3.0, None]]) == {(1, 1), (0, 2), (1, 2)}
    page = Page('A & B', 'lead', {'x': 'https://a.b/?c&d'})
    page.table(['encoder', 'k-NN'], [['ours', '1.0'], ['random', '2.0']], [[1.0], [2.0]])
    assert '<td>random</td><td><b>2.0</b></td>' in page.parts[-1] and '<b>1.0' not in page.parts[-1]


def test_a_resumed_run_continues_the_curve(tmp_path):
    for run, steps in (('1', range(1, 6)), ('2', range(4, 8))):
        path = tmp_path / run / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(f'{{"step": {step}, "run": {run}}}' for step in steps))
    assert [(row['step'], row['run']) for row in read_scalars(tmp_path)] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2),
    ]  # fmt: skip


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs Chromium')
@pytest.mark.parametrize('width', [500, 1200])
def test_in_a_browser(tmp_path, width):
    """In light mode the page is dark on white, and nothing overflows to the right."""
    rng = np.random.default_rng(0)
    page = Page('Title', 'lead ' * 50)
    page.table(['encoder', *'abcdefgh'], [[f'row {i}', *(f'{i}.{j}\n1 to 2' for j in range(8))] for i in range(3)])
    page.gallery([f'column {i}' for i in range(8)], [list(rng.integers(0, 255, (8, 64, 64, 3), np.uint8))], ['noise'])
    page.write(tmp_path / 'page.html', 'footer')
    shot = tmp_path / 'shot.png'
    options = ['--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', f'--user-data-dir={tmp_path}/c']
    command = [
        'chromium',
        *options,
        f'--window-size={width},900',
        f'--screenshot={shot}',
        f'file://{tmp_path}/page.html',
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = cv2.imread(str(shot))
    assert pixels.shape[1] == width
    assert (pixels[:, -10:] == 255).all()  # the margin is empty, as wide parts scroll within themselves
    assert (pixels[:200] < 80).any() and len(np.unique(pixels[400:].reshape(-1, 3), axis=0)) > 1000
