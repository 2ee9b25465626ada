"""See MILAN at work: train a MaskCLIP on captions, then a MILAN encoder with it as teacher, and write a page about it.

Without options the demo draws its own captioned images and downloads nothing. With --data it takes your images, and a
real CLIP (--teacher) in place of the MaskCLIP. With --full it also fine-tunes for classification, detection and
segmentation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmmilan.demo.run import run_demo
from mmmilan.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('demo'), help='folder to write everything to')
    parser.add_argument('--data', type=Path, help='your own images, with or without folders for the classes')
    parser.add_argument(
        '--teacher',
        help='MODEL:TAG of open_clip, e.g. ViT-B-16-quickgelu:openai (the default with --data), or a file in '
        "OpenAI's layout",
    )
    parser.add_argument(
        '--full',
        action='store_true',
        help='also fine-tune for classification, detection and segmentation, from MILAN and from random weights',
    )
    parser.add_argument(
        '--num-images', type=int, default=3000, help='training images to draw; a third as many are drawn for testing'
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs-scale', type=float, default=1.0, help='multiplies the number of epochs')
    args = parser.parse_args()
    if args.full and (args.data or args.teacher):
        raise InputError("--full is for the demo's own images and CLIP; drop --data and --teacher.")
    return args


if __name__ == '__main__':
    with exit_on_input_error():
        run_demo(parse_args())
