"""The report page, which says whether pretraining helped."""

from __future__ import annotations

import re
import shutil

import pytest

import mmmilan
from mmmilan.errors import InputError


@pytest.fixture(autouse=True)
def no_page_of_the_run(monkeypatch):
    monkeypatch.setattr('mmmilan.api.pretrain.write_report', lambda *args, **kwargs: None)


@pytest.mark.slow
def test_from_a_run_to_a_page(image_folder, quick, tmp_path):
    quick['epochs'] = 1
    first = mmmilan.pretrain(image_folder, tmp_path / 'a', **quick)
    second = mmmilan.pretrain(image_folder, tmp_path / 'b', start=str(first), **quick)
    page = mmmilan.report(image_folder, second, tmp_path / 'report.html', compare=first).read_text()
    verdicts = re.findall(r'class="verdict">(Pretraining [^<]+)', page)
    assert len(verdicts) == 1 and 'with starting point' in verdicts[0] and '95 % interval' in verdicts[0]
    for name in ('pretrained', 'pretrained: a/milan', 'starting point', 'random weights', 'teacher'):
        for row in (name, f'{name}, mean token'):
            assert re.search(rf'<td>{row}</td><td[^>]*>(<b>)?[\d.]+(</b>)?<small>[\d.]+ to [\d.]+</small>', page), row
    by_mean = re.findall(r'By the mean of the patch tokens, k-NN gets [^<]+ with ([^<]+) \(difference', page)
    assert by_mean == ['starting point', 'pretrained: a/milan']
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


@pytest.mark.slow
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
    assert re.search(r'<td>always class0</td><td[^>]*>(<b>)?50.0', page) and '<small>class2</small>' in page
    printed = capfd.readouterr()
    assert len((printed.out + printed.err).splitlines()) < 12
    (data / 'val/class0').rename(data / 'val/other')
    with pytest.raises(
        InputError, match=r'val/? has 1 of its 2 classes, other \(8 samples\), where .*Train/? has class0'
    ):
        mmmilan.report(data, weights, tmp_path / 'other.html')
