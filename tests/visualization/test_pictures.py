"""The curves of a run."""

from __future__ import annotations

from mmmilan.visualization.pictures import read_scalars


def test_a_resumed_run_continues_the_curve(tmp_path):
    for run, steps in (('1', range(1, 6)), ('2', range(4, 8))):
        path = tmp_path / run / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(f'{{"step": {step}, "run": {run}}}' for step in steps))
    assert [(row['step'], row['run']) for row in read_scalars(tmp_path)] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2),
    ]  # fmt: skip
