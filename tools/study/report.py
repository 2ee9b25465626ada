"""The table and the figure of the study, from the lines of its results file."""

from __future__ import annotations

import statistics
from pathlib import Path

from arms import ARMS, MEASURES
from scipy.stats import t as student

from mmmilan.errors import InputError
from mmmilan.files import atomic_write, write_text

REFERENCE = 'MILAN'
CURVES = ('linear probe', 'k-NN', 'linear probe, mean token', 'k-NN, mean token')


def values_of(lines: list[dict], arm: str, measure: str) -> dict[int, float]:
    """A measure of an arm, by seed."""
    lines = [line for line in lines if line['arm'] == arm and measure in line['measures']]
    return {line['seed']: line['measures'][measure] for line in lines}


def significance(values: dict[int, float], reference: dict[int, float]) -> str:
    """' +' or ' -' if the 95 % interval (Student's t) of the paired differences over seeds excludes zero, else ''."""
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    if len(differences) < 2:
        return ''
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    bound = student.ppf(0.975, len(differences) - 1) * error
    return '' if abs(mean) <= bound else ' +' if mean > 0 else ' -'


def cell(values: dict[int, float], reference: dict[int, float]) -> str:
    """Mean ± standard deviation over seeds, with a mark if it differs from the reference."""
    numbers = list(values.values())
    if not numbers:
        return ''
    deviation = f' ± {statistics.stdev(numbers):.1f}' if len(numbers) > 1 else ''
    return f'{statistics.mean(numbers):.1f}{deviation}{significance(values, reference)}'


def tflop(line: dict) -> float:
    """TFLOP of the training of a run."""
    return line['gflop_per_image'] * line['images'] / 1e3


def markdown(lines: list[dict]) -> str:
    """The table in Markdown, one row per arm."""
    rows = [['', 'seeds', 'TFLOP', *MEASURES], ['---'] * (3 + len(MEASURES))]
    for arm in ('teacher', *ARMS):
        runs = [line for line in lines if line['arm'] == arm]
        if runs:
            compute = f'{tflop(runs[0]):.1f}' if 'gflop_per_image' in runs[0] else ''
            cells = [cell(values_of(lines, arm, m), values_of(lines, REFERENCE, m)) for m in MEASURES]
            rows.append([arm, str(len(runs)), compute, *cells])
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def seconds_an_image(lines: list[dict], arm: str) -> float | None:
    """CPU time of training on one image: of the arm's fastest run, as others were held up by other jobs."""
    runs = [line for line in lines if line['arm'] == arm and line['images'] and not line['resumed']]
    return min((line['cpu_seconds'] / line['images'] for line in runs), default=None)


def curve_of(lines: list[dict], arm: str, measure: str) -> list[tuple[float, float]]:
    """CPU time of the training in seconds, and the mean over seeds of a measure, at each point of an arm's curve."""
    seconds, points = seconds_an_image(lines, arm), {}
    for line in lines:
        for point in line['curve'] if line['arm'] == arm and seconds else ():
            points.setdefault(seconds * line['images'] * point['epoch'] / line['epochs'], []).append(point[measure])
    return sorted((time, statistics.mean(values)) for time, values in points.items())


def drawn(lines: list[dict]) -> list[str]:
    """The arms that the figure shows: those with several seeds, or all if there is one seed alone."""
    seeds = {arm: {line['seed'] for line in lines if line['arm'] == arm} for arm in ARMS}
    return [arm for arm in ARMS if len(seeds[arm]) > 1] or list(ARMS)


def draw(lines: list[dict], path: Path) -> None:
    """Plot the curves: accuracy over the CPU time of the training, the mean over seeds."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, layout='constrained')
    colours = pyplot.get_cmap('tab20').colors
    for axis, measure in zip(axes.flat, CURVES, strict=True):
        for i, arm in enumerate(drawn(lines)):
            curve = curve_of(lines, arm, measure)
            if curve:
                axis.plot(*zip(*curve, strict=True), label=arm, color=colours[i], marker='o', markersize=4)
        axis.set(xlabel='CPU time of one thread, s', ylabel=f'{measure}, %', xscale='log')
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 4, 6, 8)))
        axis.xaxis.set_major_formatter('{x:g}')
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc='outside right center', fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)
    pyplot.close(figure)


FILES = ('table.md', 'curves.png')


def write_report(lines: list[dict], folder: Path) -> None:
    """Write ``table.md`` and ``curves.png``.

    Raises:
        InputError: there is no run yet.
    """
    if not any(line['arm'] in ARMS for line in lines):
        raise InputError('The results file holds no run of an arm; run the study first.')
    write_text(folder / 'table.md', markdown(lines))
    draw(lines, folder / 'curves.png')
