"""The bars of a GPU."""

from __future__ import annotations

import pytest

from helpers import ROOT


@pytest.mark.gpu
@pytest.mark.parametrize('options', [[], ['--compile']], ids=['plain', 'compiled'])
def test_bars_on_a_gpu(benchmark, tmp_path, options):
    """The step, ViT-B/16, batch 256, bfloat16, against mmpretrain's in the same precision, as computed beforehand.

    By tools/speed/estimate.py, for an A100, the work of both is the same. mmpretrain's takes 256 ms as it is;
    ours 171 ms, and 129 compiled. At the peak ours has 13.4 GB against 17.1, some 9.9 compiled. The bars
    leave room for what the assumptions miss. The figures for docs/performance.md are written to work_dirs/speed.
    """
    path = ROOT / f'work_dirs/speed/step{"-compiled" if options else ""}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    report = benchmark(path, 'step', *options, '--warmup', 5, '--rounds', 10)
    assert report['ratio'] >= (1.3 if options else 1.1)
    assert report['memory_ratio'] <= (0.65 if options else 0.85)
    mfu = report['contestants']['mmmilan']['mfu']
    assert mfu is None or mfu >= (0.3 if options else 0.25)  # None: a GPU whose peak is not known here


@pytest.mark.gpu
@pytest.mark.parametrize('command', ['teacher', 'decoder', 'detection', 'segmentation'])
def test_figures_on_a_gpu(benchmark, tmp_path, command):
    """Parts of the step and the encoders of dense tasks are no slower than the incumbents'."""
    path = ROOT / f'work_dirs/speed/{command}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    assert benchmark(path, command, '--warmup', 5, '--rounds', 10)['ratio'] >= 0.95
