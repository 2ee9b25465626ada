"""What a folder of very many images costs before the first of them is used.

python tools/speed/listing.py --images 1000000 --folder /data/million

Makes the folder if it does not exist: images of 32 x 32 pixels in folders of 1000, each folder with links to one file.
Then prints, for `mmmilan.pretrain` up to its first step and for `mmmilan.embed` up to its first batch, the CPU time and
how far memory grows above the imports. Encoder and teacher are small and have random weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from rich.progress import track
from torch import nn

import mmmilan
from mmmilan.api.recipe import base_config
from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.errors import exit_on_input_error
from mmmilan.models import MILAN, MILANViT

PER_FOLDER = 1000
WEIGHTS = 'vit.pth'
ARCH = dict(embed_dims=32, num_layers=1, num_heads=1, feedforward_channels=32)


class Reached(Exception):
    """The work that is not measured begins."""


def make_images(folder: Path, images: int) -> None:
    """Links to one image in each folder: a file system allows some ten thousand to a file."""
    for number in track(range(-(-images // PER_FOLDER)), 'Images'):
        part = folder / f'class{number:05}'
        part.mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), number % 256, np.uint8)).save(part / '0000.png')
        for i in range(1, min(PER_FOLDER, images - number * PER_FOLDER)):
            os.link(part / '0000.png', part / f'{i:04}.png')


def measure(task: str, folder: Path, queue: multiprocessing.Queue) -> None:
    """Put on the queue the seconds of CPU and the bytes that a command takes until the encoder is called."""

    def stop(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, MILAN if task == 'pretrain' else MILANViT):
            raise Reached

    torch.set_num_threads(1)
    init_default_scope('mmpretrain')
    backbone = dict(type='mmmilan.MILANViT', arch=ARCH)
    with tempfile.TemporaryDirectory() as temporary:
        config = base_config()
        config.model = dict(type='ImageClassifier', backbone=backbone)
        state = {f'backbone.{key}': value for key, value in MODELS.build(backbone).state_dict().items()}
        save_checkpoint_file(dict(state_dict=state, meta=dict(cfg=config.pretty_text)), Path(temporary) / WEIGHTS)
        begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        nn.modules.module.register_module_forward_pre_hook(stop)
        try:
            dict(pretrain=pretrain, embed=embed)[task](folder, Path(temporary))
        except Reached:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            queue.put((time.process_time() - begin, grown * 1024))


def pretrain(folder: Path, temporary: Path) -> None:
    """Pretrain a small encoder, without evaluation."""
    teacher = dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=None, input_size=64)
    loader = {f'train_dataloader.{key}': 0 for key in ('num_workers', 'persistent_workers', 'pin_memory')}
    options = dict(arch=ARCH, img_size=64, epochs=1, custom_hooks=[])
    mmmilan.pretrain(str(folder), str(temporary / 'out'), teacher=teacher, **options, **loader)


def embed(folder: Path, temporary: Path) -> None:
    """Write the features of the images by the encoder that :func:`measure` saved."""
    mmmilan.embed(str(folder), str(temporary / WEIGHTS), str(temporary / 'features.npz'), num_workers=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, required=True, help='folder of the images; made if it does not exist')
    parser.add_argument('--images', type=int, default=1_000_000, help='how many to make')
    args = parser.parse_args()
    if not args.folder.exists():
        make_images(args.folder, args.images)
    context = multiprocessing.get_context('spawn')
    for task in ('pretrain', 'embed'):
        queue = context.Queue()
        process = context.Process(target=measure, args=(task, args.folder, queue))
        process.start()
        process.join()
        seconds, grown = queue.get(timeout=1)
        print(f'{task}: {seconds:.1f} s of CPU, {grown / 1e6:.0f} MB above the imports')


if __name__ == '__main__':
    with exit_on_input_error():
        main()
