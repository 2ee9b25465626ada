"""See MILAN at work: from captions to a MaskCLIP, from it to a MILAN encoder, from there to a page of pictures.

Without options it draws its own captioned images and downloads nothing. With --data it takes your images, and a
real CLIP (--teacher) in place of the MaskCLIP that it would train on captions. With --full it goes on to
classification, detection and segmentation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmmilan.demo.run import run_demo
from mmmilan.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('demo'), help='folder of everything that the demo writes')
    parser.add_argument('--data', type=Path, help='your own images, in folders named by class or in any other way')
    parser.add_argument(
        '--teacher',
        help='MODEL:TAG of open_clip, e.g. ViT-B-16-quickgelu:openai (the default with --data), or a file in '
        "OpenAI's layout",
    )
    parser.add_argument(
        '--full',
        action='store_true',
        help='fine-tune for classification, detection and segmentation too, from MILAN and from random weights',
    )
    parser.add_argument('--num-images', type=int, default=3000, help='how many images to draw, and a third for testing')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs-scale', type=float, default=1.0, help='train this many times the default epochs')
    args = parser.parse_args()
    if args.full and (args.data or args.teacher):
        raise InputError("--full is for the demo's own images and CLIP; drop --data and --teacher.")
    return args


if __name__ == '__main__':
    with exit_on_input_error():
        run_demo(parse_args())
