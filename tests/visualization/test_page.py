"""A page: tables with the best in bold, and how it looks in a browser."""

from __future__ import annotations

import shutil
import subprocess

import cv2
import numpy as np
import pytest

from mmmilan.visualization.page import Page, best_cells


def test_bold_is_the_best_whichever_row_it_is_in():
    assert best_cells([[1.0, 5.0, None], [2.0, 5.0, 1.0], [0.5, 3.0, None]]) == {(1, 1), (0, 2), (1, 2)}
    page = Page('A & B', 'lead', {'x': 'https://a.b/?c&d'})
    page.table(['encoder', 'k-NN'], [['ours', '1.0'], ['random', '2.0']], [[1.0], [2.0]])
    assert '<td>random</td><td><b>2.0</b></td>' in page.parts[-1] and '<b>1.0' not in page.parts[-1]


@pytest.mark.slow
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
