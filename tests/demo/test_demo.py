"""The demo, small: every stage runs and leaves what it promises."""

from __future__ import annotations

import json
import re

PROBES = ('linear probe', 'with 10 % of the labels', 'k-NN')


def test_demo_on_its_own_scenes(run_tool, tmp_path, capsys):
    out = tmp_path / 'demo'
    run_tool('demo.py', '--out', out, '--num-images', 30, '--epochs-scale', 0.1, '--full')

    scores = json.loads((out / 'results-seed0.json').read_text())
    transfer = scores.pop('transfer')
    teacher = scores.pop('MaskCLIP')['zero-shot']
    assert 0 <= teacher <= 100
    assert list(scores) == ['MILAN', 'MAE', 'random']
    assert all(0 <= score[probe] <= 100 for score in scores.values() for probe in PROBES)
    for part in ('scenes/annotations/instances_val.json', 'maskclip-seed0/epoch_2.pth', 'milan-seed0/epoch_2.pth'):
        assert (out / part).exists(), part

    page = (out / 'index.html').read_text()
    zero_shot = scores['MILAN'].pop('zero-shot')
    assert f'<td>{zero_shot:.1f}</td>' in page and f'<td>teacher</td>{3 * "<td>–</td>"}<td>{teacher:.1f}</td>' in page
    for name, score in scores.items():
        assert f'<td>{name}</td>' + ''.join(f'<td>{score[probe]:.1f}</td>' for probe in PROBES) in page
    for task, score in transfer.items():
        assert f'<td>{task}</td><td>{score["random"]:.1f}</td><td>{score["MILAN"]:.1f}</td>' in page
    tasks = ['classification, top-1', 'detection, box AP', 'detection, mask AP', 'segmentation, mIoU']
    assert list(transfer) == tasks
    assert page.count('<img') == 8 * 7 + 6 * 5 + 6 * 7  # images by columns
    assert page.count('<svg') == 1
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert str(out / 'index.html') in capsys.readouterr().out.replace('\n', '')


def test_demo_on_a_folder_with_a_given_teacher(run_tool, image_folder, clip_file, tmp_path, capsys):
    out = tmp_path / 'demo'
    run_tool('demo.py', '--out', out, '--data', image_folder, '--teacher', clip_file, '--epochs-scale', 0.1)
    assert set(json.loads((out / 'results-seed0.json').read_text())) == {'MILAN', 'MAE', 'random'}
    assert (out / 'index.html').stat().st_size > 10_000
    assert 'Without zero-shot accuracy and heat maps' in capsys.readouterr().out  # an image tower alone
