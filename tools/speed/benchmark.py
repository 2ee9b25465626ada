"""Time mmmilan and the OpenMMLab code that it replaces, in turns in one process.

python tools/speed/benchmark.py step                      # the pretraining step, ViT-B/16 at 224, on the GPU if any
python tools/speed/benchmark.py data --data-root images   # the input pipeline, on one core
"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
import json
import logging
import os
import platform
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from contestants import CONTESTS, SIZES
from mmengine.logging import MMLogger
from options import OPTIONS
from rich.console import Console
from rich.table import Table
from timing import Result, compete

from mmmilan.engine.throughput import peak_tflops
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.files import check_output, write_text

# image size and batch size of each command, on a GPU and on a CPU
DEFAULTS = dict(
    step=(224, 256, 32),
    teacher=(224, 256, 32),
    decoder=(224, 256, 32),
    data=(224, 100, 100),
    detection=(1024, 2, 1),
    segmentation=(512, 2, 2),
)
# Row of the table -> key of the figure in the JSON file.
ROWS = {
    'precision': 'precision',
    'GFLOP/image': 'gflops_per_image',
    'GFLOP/masked view': 'gflops_per_view',
    'MFU': 'mfu',
    'peak memory, MB': 'peak_memory_mb',
    'pixels differ by, of 255': 'pixel_difference',
}


def parse_args() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=DEFAULTS)
    parser.add_argument('--arch', choices=SIZES, default='base', help='size of the encoder (default: base)')
    parser.add_argument('--img-size', type=int, help='side of the images; default: that of the recipe')
    parser.add_argument('--patch-size', type=int, default=16)
    parser.add_argument(
        '--batch-size', type=int, help='images at a time; default: 256 on a GPU, 32 on CPU; dense: 2, 1'
    )
    parser.add_argument('--dtype', choices=['bfloat16', 'float32'], default='bfloat16' if cuda else 'float32')
    parser.add_argument('--device', default='cuda' if cuda else 'cpu')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads; the data pipeline always has one')
    parser.add_argument('--compile', action='store_true', help="compile mmmilan's step as a whole")
    parser.add_argument(
        '--options',
        nargs='+',
        choices=OPTIONS,
        default=[],
        help='step: also time mmmilan with these options (docs/efficiency.md)',
    )
    parser.add_argument('--data-root', help='folder of images, for the data command')
    parser.add_argument('--warmup', type=int, default=2, help='rounds before timing starts')
    parser.add_argument('--rounds', type=int, default=10, help='timed rounds')
    parser.add_argument('--peak-tflops', type=float, help='dense TFLOP/s of the device, if it is not in the list')
    parser.add_argument('--json', type=Path, help='write all figures to this file')
    parser.add_argument('--overwrite', action='store_true', help='replace the file of --json if it exists')
    args = parser.parse_args()
    if args.json:
        check_output(args.json, endings=('.json',), overwrite=args.overwrite)
    img_size, *batch_sizes = DEFAULTS[args.command]
    args.img_size = args.img_size or img_size
    args.batch_size = args.batch_size or batch_sizes[not args.device.startswith('cuda')]
    args.device, args.dtype = torch.device(args.device), getattr(torch, args.dtype)
    return args


@contextmanager
def quiet() -> Iterator[None]:
    """Silence MMEngine, which logs every weight that it initialises and every parameter that it optimises."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def describe_machine(args: argparse.Namespace) -> dict:
    """Names of the device and versions of the software."""
    if args.device.type == 'cuda':
        name = torch.cuda.get_device_name(args.device)
    else:
        models = [line.split(':')[1] for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line]
        name = f'{models[0].strip() if models else platform.processor()}, {args.threads} of {os.cpu_count()} cores'
    return dict(device=name, torch=torch.__version__, python=platform.python_version())


def summarise(result: Result, peak: float | None) -> dict:
    """The figures of one contestant for the JSON file; ``peak`` is in TFLOP/s."""
    median = statistics.median(result.seconds)
    quartiles = statistics.quantiles(result.seconds, n=4) if len(result.seconds) > 1 else [median] * 3
    rate = result.images / median
    gflops = result.flops / result.images / 1e9 if result.flops else None
    return dict(
        images_per_s=rate,
        ms=dict(median=1e3 * median, quartiles=[1e3 * quartiles[0], 1e3 * quartiles[2]]),
        ms_by_part={part: 1e3 * statistics.median(seconds) for part, seconds in result.parts.items()},
        gflops_per_image=gflops,
        mfu=rate * gflops / (1e3 * peak) if peak and gflops else None,
        peak_memory_mb=result.peak_memory / 1e6 if result.peak_memory is not None else None,
        **result.extra,
    )


def as_text(cell: str | float | None) -> str:
    """A cell of the table; numbers have four digits."""
    return cell if isinstance(cell, str) else '' if cell is None else f'{cell:,.4g}'


def print_table(title: str, figures: dict[str, dict]) -> None:
    """Print the figures, one column per contestant."""
    table = Table(title=title, title_justify='left')
    table.add_column()
    for name in figures:
        table.add_column(name, justify='right')
    rows = {'images/s': [values['images_per_s'] for values in figures.values()]}
    rows['ms'] = [values['ms']['median'] for values in figures.values()]
    rows['ms, quartiles'] = ['{:.1f} to {:.1f}'.format(*values['ms']['quartiles']) for values in figures.values()]
    for part in dict.fromkeys(part for values in figures.values() for part in values['ms_by_part']):
        rows[f'ms, {part}'] = [values['ms_by_part'].get(part) for values in figures.values()]
    for row, key in ROWS.items():
        rows[row] = [values.get(key) for values in figures.values()]
    for row, cells in rows.items():
        if any(cell is not None for cell in cells):
            table.add_row(row, *[as_text(cell) for cell in cells])
    Console().print(table)


def main() -> None:
    args = parse_args()
    if args.command == 'data' and not args.data_root:
        raise InputError('The data command has no images; give --data-root FOLDER.')
    torch.set_num_threads(1 if args.command == 'data' else args.threads)
    peak = args.peak_tflops or peak_tflops(args.device, args.dtype)
    with quiet():
        results = compete(CONTESTS[args.command](args), args)
    figures = {name: summarise(result, peak) for name, result in results.items()}
    ours = figures['mmmilan']
    options = {name: values for name, values in figures.items() if name.startswith('mmmilan, ')}
    others = [values for name, values in figures.items() if name not in ('mmmilan', *options)]
    ratios = {n: ours['images_per_s'] / v['images_per_s'] for n, v in figures.items() if v in others}
    option_ratios = {n: v['images_per_s'] / others[0]['images_per_s'] for n, v in options.items()}
    settings = {key: str(value) for key, value in vars(args).items() if value is not None and key != 'json'}
    print_table(f'{args.command}: {settings["arch"]}, {args.img_size} pixels, batch {args.batch_size}', figures)
    for name, ratio in ratios.items():
        print(f'{ratio:.2f} times {name}')
    for name, ratio in option_ratios.items():
        print(f'{name}: {ratio:.2f} times {list(ratios)[0]}')
    if args.json:
        report = dict(
            command=args.command,
            ratio=next(iter(ratios.values())),
            ratios=ratios,
            option_ratios=option_ratios,
            memory_ratio=ours['peak_memory_mb'] / others[0]['peak_memory_mb'] if ours['peak_memory_mb'] else None,
            machine=describe_machine(args),
            settings=settings,
            contestants=figures,
        )
        write_text(args.json, json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
    with exit_on_input_error():
        main()
