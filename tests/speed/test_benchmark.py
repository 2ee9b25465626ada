"""The benchmark measures what it says."""

from __future__ import annotations

import pytest

from helpers import real_data

TINY = ['--arch', 'tiny', '--img-size', 64, '--batch-size', 2, '--rounds', 2, '--warmup', 0, '--device', 'cpu']
FIGURES = {'images_per_s', 'ms', 'ms_by_part', 'gflops_per_image', 'mfu', 'peak_memory_mb'}


@pytest.mark.parametrize(
    ('command', 'options', 'parts'),
    [
        ('step', ['--peak-tflops', 1], {'teacher', 'encoder, decoder', 'backward', 'optimizer'}),
        pytest.param(
            'step',
            ['--dtype', 'bfloat16'],
            {'teacher', 'encoder, decoder', 'backward', 'optimizer'},
            marks=pytest.mark.slow,
        ),
        ('teacher', [], set()),
        pytest.param('decoder', [], {'forward', 'backward'}, marks=pytest.mark.slow),
        pytest.param('detection', [], {'forward', 'backward'}, marks=pytest.mark.slow),
        pytest.param('segmentation', [], {'forward', 'backward'}, marks=pytest.mark.slow),
    ],
)
def test_benchmark(benchmark, tmp_path, command, options, parts):
    if command in ('detection', 'segmentation'):
        pytest.importorskip('mmseg')
    report = benchmark(tmp_path / 'report.json', command, *TINY, *options)
    ours, *others = report['contestants'].values()
    assert list(report['contestants'])[0] == 'mmmilan' and others
    theirs = next(v for name, v in report['contestants'].items() if not name.startswith('mmmilan'))
    assert report['ratio'] == pytest.approx(ours['images_per_s'] / theirs['images_per_s'])
    assert report['machine']['device'] and report['settings']['batch_size'] == '2'
    for figures in (ours, *others):
        assert FIGURES.issubset(figures) and set(figures['ms_by_part']) == parts
        assert figures['images_per_s'] == pytest.approx(2000 / figures['ms']['median'])
        assert figures['gflops_per_image'] > 0
        low, high = figures['ms']['quartiles']
        assert low <= figures['ms']['median'] <= high
    if '--dtype' in options:
        assert [figures['precision'] for figures in others] == ['bfloat16', 'float32']
    if '--peak-tflops' in options:
        assert ours['mfu'] == pytest.approx(ours['gflops_per_image'] * ours['images_per_s'] / 1000)


@pytest.mark.slow
def test_benchmark_of_less_computation(benchmark, tmp_path):
    """Each option is compared with mmpretrain's MILAN, and takes fewer operations than ours."""
    options = ('alignment', 'cached')
    report = benchmark(tmp_path / 'report.json', 'step', *TINY, '--options', *options)
    theirs, ours = report['contestants']['mmpretrain in float32'], report['contestants']['mmmilan']
    for name in options:
        figures = report['contestants'][f'mmmilan, {name}']
        ratio = figures['images_per_s'] / theirs['images_per_s']
        assert report['option_ratios'][f'mmmilan, {name}'] == pytest.approx(ratio)
        assert figures['gflops_per_image'] < ours['gflops_per_image']


def test_benchmark_of_the_same_work(benchmark, tmp_path):
    """Decoders of the same size take the same operations: our step saves in encoder and teacher."""
    decoders = benchmark(tmp_path / 'decoder.json', 'decoder', *TINY)['contestants']
    assert decoders['mmmilan']['gflops_per_image'] == pytest.approx(decoders['mmpretrain']['gflops_per_image'])


def test_benchmark_of_data(benchmark, run_tool, image_folder, tmp_path):
    with pytest.raises(SystemExit, match='error: The data command has no images; give --data-root'):
        run_tool('speed/benchmark.py', 'data', *TINY)
    report = benchmark(tmp_path / 'report.json', 'data', *TINY, '--data-root', image_folder)
    ours, default, fast = report['contestants'].values()
    assert ours['pixel_difference'] < 0.3 < fast['pixel_difference'] and default['pixel_difference'] == 0


@pytest.mark.slow
@pytest.mark.data
def test_bar_of_the_input_pipeline(benchmark, tmp_path):
    """Twice mmpretrain's default on real images; a timing, for an idle machine."""
    folder = real_data('imagenet_sample/train')
    assert benchmark(tmp_path / 'data.json', 'data', '--data-root', folder)['ratio'] >= 2
