"""What the defaults of `mmmilan pretrain` cost: other rates, masks and weights, by encoder, batch and folder.

python tools/study/rates.py --data data/cifar10 --work-dir work_dirs/study           # run it again to go on
python tools/study/rates.py --data data/cifar10 --work-dir work_dirs/study --cells 4-96/64/4167 --rates 5e-4 1e-3
python tools/study/rates.py ... --cells 4-96/16/4167 --rates 1e-3 --img-size 48 --cls-token 72

The study's teacher must have been trained (tools/study/study.py). A cell is ENCODER/BATCH/IMAGES, an encoder
BLOCKS-WIDTH. Every run is a line of rates.jsonl in the work dir; the table of all of them is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from arms import BUDGETS, TEST_IMAGES, read_arm
from mmengine.config import Config
from rich.console import Console
from run import features_of, in_folder, labelled_images, launched_again, newest_teacher, probe

from mmmilan.api.recipe import new_config
from mmmilan.datasets import ImageFolder
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.files import write_text

# One thing at a time is changed from the study's own size; the wide and deep ones last, as they take long.
CELLS = (
    '4-96/16/4167',
    '4-96/64/4167',
    '4-96/256/4167',
    '4-96/16/500',
    '4-96/16/25000',
    '12-192/16/4167',
    '12-384/16/4167',
)
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
VIEWS, STEPS = 16_640, 300  # a run sees so many images, but has so many steps at least
SHOWN = ('linear probe', 'k-NN', 'linear probe, mean token', 'k-NN, mean token')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path('data/cifar10'))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/study'))
    parser.add_argument('--cells', nargs='+', default=CELLS, help='ENCODER/BATCH/IMAGES')
    parser.add_argument('--rates', nargs='+', type=float, default=RATES)
    parser.add_argument('--recipe', choices=('milan', 'few-images'), default='few-images')
    parser.add_argument('--img-size', type=int, default=32, help='side of the images; patches have 4 pixels')
    parser.add_argument('--cls-token', type=float, help="weight of the class token, in patches; default: the recipe's")
    parser.add_argument('--mask-ratio', type=float, help="share of the patches that is masked; default: the recipe's")
    parser.add_argument('--start', help='initial weights of the encoder; default: random')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


def link_images(data: Path, count: int, folder: Path) -> Path:
    """A folder with links to ``count`` of the student's images, evenly spread, in their folders of classes."""
    paths = [Path(info['img_path']) for info in ImageFolder(str(data / 'train')).load_data_list()]
    paths = paths[BUDGETS['long'].images]
    for i in range(count):
        path = paths[i * len(paths) // count].absolute()
        link = folder / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            os.symlink(path, link)
    return folder


def configure(cell: str, args: argparse.Namespace) -> Config:
    """The config that ``mmmilan pretrain`` would use in a cell."""
    try:
        encoder, batch, images = cell.split('/')
        blocks, width = map(int, encoder.split('-'))
        batch, images = int(batch), int(images)
    except ValueError as error:
        raise InputError(f'The cell {cell} is not ENCODER/BATCH/IMAGES, such as {CELLS[0]}; correct it.') from error
    arch = dict(embed_dims=width, num_layers=blocks, num_heads=width // 32, feedforward_channels=4 * width)
    teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=newest_teacher(args.work_dir), head_width=32)
    folder = link_images(args.data, images, args.work_dir / f'images-{images}')
    epochs = math.ceil(max(VIEWS, STEPS * batch) / images)
    sizes = dict(arch=arch, epochs=epochs, batch_size=batch, img_size=args.img_size, patch_size=4)
    cfg = new_config([str(folder)], teacher=teacher, start=args.start, seed=args.seed, recipe=args.recipe, **sizes)
    if args.cls_token is not None:
        cfg.model.head.cls_token = args.cls_token
    if args.mask_ratio is not None:
        cfg.model.masking.mask_ratio = args.mask_ratio
    cfg.runner_type = 'Runner'
    cfg.custom_hooks = read_arm('MILAN').custom_hooks
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False, pin_memory=False)
    return cfg


def run(cell: str, rate: float, args: argparse.Namespace) -> dict:
    """Train and measure; gives the line."""
    cfg = configure(cell, args)
    cfg.optim_wrapper.optimizer.lr = rate
    cfg.default_hooks.checkpoint.interval = cfg.train_cfg.max_epochs
    of_run = {'cell': cell.replace('/', '-'), 'rate': f'{rate:g}'} | options_of(args)
    cfg = in_folder(cfg, args.work_dir / 'rates' / '-'.join(map(str, of_run.values())).replace('/', '-'))
    with launched_again(cfg) as runner:
        start = time.process_time()
        runner.train()
        seconds, steps = time.process_time() - start, runner.max_iters
    probed = read_arm('MILAN')
    resize = dict(type='Resize', scale=(args.img_size, args.img_size), interpolation='bicubic')
    probed.test_dataloader.dataset.pipeline.insert(1, resize)
    images = [
        labelled_images(probed, args.data / name, part)
        for name, part in (('train', BUDGETS['short'].images), ('test', TEST_IMAGES))
    ]
    features = (features_of(runner.model.eval(), part, joint=True) for part in images)
    measures = probe(*features, torch.load(args.work_dir / 'teacher' / 'classes.pt'))
    line = dict(cell=cell, rate=rate, steps=steps, seconds=round(seconds, 1)) | options_of(args)
    return line | dict(measures=measures)


def options_of(args: argparse.Namespace) -> dict:
    """What tells the runs of a cell and a rate apart."""
    return {name: getattr(args, name) for name in ('recipe', 'img_size', 'mask_ratio', 'cls_token', 'start', 'seed')}


def table(lines: list[dict]) -> str:
    """Markdown: one row per cell and rate; the last column is the mean of the measures less the cell's best."""
    rows = [['cell', 'recipe', 'pixels', 'start', 'masked', 'class token', 'rate', *SHOWN, 'behind the best']]
    rows.append(['---'] * len(rows[0]))
    alike = ('cell', 'recipe', 'img_size', 'start', 'seed')

    def mean(line: dict) -> float:
        return sum(line['measures'][name] for name in SHOWN) / len(SHOWN)

    for line in sorted(lines, key=lambda line: [str(line[key]) for key in alike] + [line['rate']]):
        rivals = [other for other in lines if all(other[key] == line[key] for key in alike)]
        behind = mean(line) - max(map(mean, rivals))
        of_run = [line[key] for key in ('cell', 'recipe', 'img_size', 'start', 'mask_ratio', 'cls_token')]
        shown = [f'{line["measures"][name]:.1f}' for name in SHOWN]
        rows.append([*(str(each or '') for each in of_run), f'{line["rate"]:g}', *shown, f'{behind:.1f}'])
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    path = args.work_dir / 'rates.jsonl'
    lines = [json.loads(text) for text in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []
    for cell in args.cells:
        default = configure(cell, args).optim_wrapper.optimizer.lr
        for rate in sorted({default, *args.rates}):
            key = dict(cell=cell, rate=rate) | options_of(args)
            if not any(key.items() <= line.items() for line in lines):
                lines.append(run(cell, rate, args) | dict(default=rate == default))
                write_text(path, ''.join(json.dumps(line) + '\n' for line in lines))
    Console(width=200).print(table(lines), markup=False)


if __name__ == '__main__':
    with exit_on_input_error():
        main()
