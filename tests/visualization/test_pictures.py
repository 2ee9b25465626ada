"""The curves of a run."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation

from mmmilan.visualization.pictures import class_colours, draw_pictures, read_scalars


def test_a_resumed_run_continues_the_curve(tmp_path):
    for run, steps in (('1', range(1, 6)), ('2', range(4, 8))):
        path = tmp_path / run / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(f'{{"step": {step}, "run": {run}}}' for step in steps))
    assert [(row['step'], row['run']) for row in read_scalars(tmp_path)] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(('columns', 'quantity'), [(2, 'cosine'), (5, 'attention')])
def test_heat_maps_stand_over_the_scale_of_their_colours(columns, quantity):
    """Its ends say what they mean, beside the colours and within the figure, below the pictures."""
    pictures = {f'text {i}\n0.1 to 0.2': [np.zeros((32, 32, 3), np.uint8)] for i in range(columns)}
    figure = draw_pictures(pictures, 'Greens', quantity)
    FigureCanvasAgg(figure).draw()
    images, scale = figure.axes
    words = {text.get_text(): text.get_window_extent() for text in figure.findobj(Annotation)}
    low, high = words[f'lowest {quantity}'], words['highest of each map']
    bar = scale.get_window_extent()
    assert scale.images[0].get_cmap().name == 'Greens' and np.all(np.diff(scale.images[0].get_array()[0]) > 0)
    assert 0 < low.x0 < low.x1 < bar.x0 < bar.x1 < high.x0 < high.x1 < figure.bbox.x1
    assert low.y0 >= 0 and max(low.y1, bar.y1) < images.get_window_extent().y0
    titles = [box for text, box in words.items() if text in pictures]
    assert len(titles) == columns and all(images.get_window_extent().y1 < t.y0 < t.y1 < figure.bbox.y1 for t in titles)


@pytest.mark.parametrize('number', [1, 2, 10, 150, 256])
def test_colours_of_classes_are_told_apart(number):
    """Ten that follow each other differ much; no two are the same."""
    colours = np.array(class_colours(number))
    assert len(set(map(tuple, colours))) == number and colours.min() >= 0 and colours.max() <= 255
    for first in range(number - 1):
        others = colours[first + 1 : first + 10] - colours[first]
        assert np.abs(others).max(1).min() > 40
