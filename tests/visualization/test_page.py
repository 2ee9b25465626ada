"""A page: tables with the best in bold, and how it looks in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote_to_bytes

import cv2
import numpy as np
import pytest

from mmmilan.visualization.page import Page, best_cells


def test_bold_is_the_best_whichever_row_it_is_in():
    assert best_cells([[1.0, 5.0, None], [2.0, 5.0, 1.0], [0.5, 3.0, None]]) == {(1, 1), (0, 2), (1, 2)}
    page = Page('A & B', 'lead', {'x': 'https://a.b/?c&d'})
    page.table(['encoder', 'k-NN'], [['ours', '1.0'], ['random', '2.0']], [[1.0], [2.0]])
    assert '<td>random</td><td><b>2.0</b></td>' in page.parts[-1] and '<b>1.0' not in page.parts[-1]


def test_pictures_whose_names_are_not_utf8(tmp_path):
    page, name = Page('Title', 'lead'), os.fsdecode(b'a \xff.jpg')
    page.pictures([(name, name, 'a cat')])
    page.write(tmp_path / 'index.html', '')
    address = re.search('src="(.*?)"', (tmp_path / 'index.html').read_text())[1]
    assert unquote_to_bytes(address) == os.fsencode(name)


def example(path: Path, script: str = '') -> None:
    """A page of tables of few and of many columns, and of galleries with and without words."""
    rng = np.random.default_rng(0)
    page = Page('Title', 'lead ' * 50)
    pictures = list(rng.integers(0, 255, (8, 64, 64, 3), np.uint8))
    names = [f'column {i}' for i in range(8)]
    page.gallery(names, [pictures], ['noise'])
    page.gallery(names, [pictures], ['noise'], [['a class of a long name'] * 8])
    page.table(['encoder', *'abcdefgh'], [[f'row {i}', *(f'{i}.{j}\n1 to 2' for j in range(8))] for i in range(3)])
    page.table(['class', 'images', 'taken for'], [['a_name_without_a_space' * 3, '1200', 'cat, dog, newt, ' * 5]])
    page.write(path, 'footer')
    path.write_text(path.read_text() + script)


def browse(page: Path, width: int, *options: str) -> str:
    """Open a page in a window of this width; returns what the browser prints."""
    options = ('--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', *options)
    command = [
        'chromium',
        *options,
        f'--user-data-dir={page.parent}/c',
        f'--window-size={width},900',
        f'file://{page}',
    ]
    return subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='needs Chromium')
@pytest.mark.parametrize('width', [390, 500, 1200])
def test_in_a_browser(tmp_path, width):
    """In light mode the page is dark on white, and nothing overflows to the right."""
    shot = tmp_path / 'shot.png'
    example(tmp_path / 'page.html')
    browse(tmp_path / 'page.html', width, f'--screenshot={shot}')
    pixels = cv2.imread(str(shot))
    assert pixels.shape[1] == width
    assert (pixels[:, -10:] == 255).all()  # the margin is empty
    assert (pixels[:200] < 80).any() and len(np.unique(pixels[400:].reshape(-1, 3), axis=0)) > 1000


# Of each cell: its left and right edge, the picture's edges, and the name that stands before it.
CELLS = """<script>
const edges = e => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom] }
const cells = [...document.querySelectorAll('td')].map(cell => ({ edges: edges(cell),
  name: getComputedStyle(cell, '::before').content, small: [...cell.querySelectorAll('small, img')].map(edges) }))
parent.document.querySelector('pre').textContent = JSON.stringify({ width: innerWidth, cells })
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='needs Chromium')
@pytest.mark.parametrize('width', [320, 390, 640])
def test_all_columns_are_seen_on_a_narrow_screen(tmp_path, width):
    """No cell lies outside of the window; each has the name of its column where the head of the table is not shown."""
    example(tmp_path / 'page.html', CELLS)
    inner = html.escape((tmp_path / 'page.html').read_text())
    frame = (
        f'<iframe style="border: 0" width="{width}" height="3000" srcdoc="{inner}"></iframe>'  # as wide as any phone
    )
    (tmp_path / 'frame.html').write_text(f'<!doctype html><pre></pre>{frame}')
    found = json.loads(re.search(r'<pre>(.*)</pre>', browse(tmp_path / 'frame.html', 1200, '--dump-dom')).group(1))
    cells = found['cells']
    assert found['width'] == width and len(cells) == 3 * 9 + 3 + 2 * 8
    for cell in cells:
        left, right, top, bottom = cell['edges']
        assert 0 <= left < right <= width and top < bottom
        for inner in cell['small']:
            assert left <= inner[0] < inner[1] <= right and top <= inner[2] < inner[3] <= bottom
    named = [cell['name'].strip('"') for cell in cells]
    assert named == [f'column {i}' for i in range(8)] * 2 + ['none', *'abcdefgh'] * 3 + ['none'] * 3
    side = {round(cell['small'][0][1] - cell['small'][0][0]) for cell in cells[:16]}
    assert len(side) == 1 and side.pop() >= 100  # pictures of one size, large enough to see
