"""The demo, small: every stage runs and writes its results."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest

PROBES = ('linear probe', 'with 10 % of the labels', 'k-NN')


@pytest.mark.slow
def test_demo_on_its_own_scenes(run_tool, tmp_path, capsys):
    out = tmp_path / 'demo'
    run_tool('demo/demo.py', '--out', out, '--num-images', 30, '--epochs-scale', 0.1, '--full')

    scores = json.loads((out / 'results-seed0.json').read_text())
    transfer = scores.pop('transfer')
    teacher = scores.pop('MaskCLIP')['zero-shot']
    assert 0 <= teacher <= 100
    assert list(scores) == ['MILAN', 'MAE', 'random', 'teacher']
    assert all(0 <= score[probe] <= 100 for score in scores.values() for probe in PROBES)
    for part in ('scenes/annotations/instances_val.json', 'maskclip-seed0/epoch_2.pth', 'milan-seed0/epoch_2.pth'):
        assert (out / part).exists(), part

    page = re.sub(' data-column="[^"]*"', '', (out / 'index.html').read_text())
    zero_shot = scores['MILAN'].pop('zero-shot')
    assert all(re.search(f'<td>(<b>)?{score:.1f}(</b>)?</td>', page) for score in (zero_shot, teacher))
    best = {probe: max(score[probe] for score in scores.values()) for probe in PROBES}
    for name, score in scores.items():  # bold is the best, whichever it is
        cells = [
            f'<b>{score[probe]:.1f}</b>' if score[probe] == best[probe] else f'{score[probe]:.1f}' for probe in PROBES
        ]
        assert f'<td>{name}</td>' + ''.join(f'<td>{cell}</td>' for cell in cells) in page
    assert list(transfer) == ['classification', 'detection', 'segmentation']
    for task, score in transfer.items():
        compared = json.loads((out / f'{task}-seed0/comparison.json').read_text())
        assert [score['MILAN'], score['random']] == compared['means'] and len(compared['images']) == 10
        means, interval = (f'{mean:.1f}' for mean in compared['means']), '{:+.1f} to {:+.1f}'
        cells = [task, compared['score'], *means, interval.format(*compared['interval'])]
        assert ''.join(f'<td>{cell}</td>' for cell in cells) in page
        assert f'{task}-seed0/report.html' in page and (out / f'{task}-seed0/report.html').exists()
    assert page.count('<img') == 8 * 7 + 6 * 5  # images by columns
    assert page.count('<svg') == 3  # the losses of MaskCLIP, MILAN and MAE
    assert not re.search(r'src="(?!data:)|<link|<script', page)  # it loads nothing
    assert page.count('alt=""') == 0 and 'attention: MAE: ' in page
    assert str(out / 'index.html') in capsys.readouterr().out.replace('\n', '')


@pytest.mark.slow
def test_demo_on_a_folder_with_a_given_teacher(run_tool, image_folder, clip_file, tmp_path, capsys):
    out = tmp_path / 'demo'
    run_tool('demo/demo.py', '--out', out, '--data', image_folder, '--teacher', clip_file, '--epochs-scale', 0.1)
    assert set(json.loads((out / 'results-seed0.json').read_text())) == {'MILAN', 'MAE', 'random', 'teacher'}
    assert (out / 'index.html').stat().st_size > 10_000
    assert 'Without zero-shot accuracy and heat maps' in capsys.readouterr().out  # an image tower alone


@pytest.mark.slow
def test_demo_on_a_flat_folder(run_tool, clip_file, tmp_path):
    """Images without folders of classes give a page of pictures without scores."""
    rng = np.random.default_rng(0)
    (tmp_path / 'photos').mkdir()
    for i in range(8):
        cv2.imwrite(str(tmp_path / 'photos' / f'{i}.png'), rng.integers(0, 255, (70, 70, 3), dtype=np.uint8))
    options = ('--out', tmp_path / 'demo', '--teacher', clip_file, '--epochs-scale', 0.1)
    run_tool('demo/demo.py', '--data', tmp_path / 'photos', *options)
    page = (tmp_path / 'demo/index.html').read_text()
    assert 'What MILAN sees' in page and 'What the frozen encoders know' not in page
    with pytest.raises(SystemExit, match='nowhere does not exist'):
        run_tool('demo/demo.py', '--data', 'nowhere', *options)
