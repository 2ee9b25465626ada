"""The curves of a run."""

from __future__ import annotations

import numpy as np
import pytest

from mmmilan.visualization.pictures import class_colours, read_scalars


def test_a_resumed_run_continues_the_curve(tmp_path):
    for run, steps in (('1', range(1, 6)), ('2', range(4, 8))):
        path = tmp_path / run / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(f'{{"step": {step}, "run": {run}}}' for step in steps))
    assert [(row['step'], row['run']) for row in read_scalars(tmp_path)] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2),
    ]  # fmt: skip


@pytest.mark.parametrize('number', [1, 2, 10, 150, 256])
def test_colours_of_classes_are_told_apart(number):
    """Ten that follow each other differ much; no two are the same."""
    colours = np.array(class_colours(number))
    assert len(set(map(tuple, colours))) == number and colours.min() >= 0 and colours.max() <= 255
    for first in range(number - 1):
        others = colours[first + 1 : first + 10] - colours[first]
        assert np.abs(others).max(1).min() > 40
