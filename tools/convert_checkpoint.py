"""Convert a checkpoint between the layouts of mmmilan, OpenMMLab, the published repository, timm and Hugging Face."""

from __future__ import annotations

import argparse

from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.layouts import COLUMN, TITLE, convert, detect_layout
from mmmilan.checkpoints.zoo import resolve_checkpoint
from mmmilan.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='file, URL, or name of a model of the zoo; its layout is recognised')
    parser.add_argument('dst', help='file to write, .pth or .safetensors')
    parser.add_argument('--to', choices=list(COLUMN), default='mmmilan', help='layout to write (default: %(default)s)')
    parser.add_argument('--encoder-only', action='store_true', help='leave decoder, head and detector parts')
    parser.add_argument(
        '--allow-pickle', action='store_true', help='read a file that runs code when it is read: only if you trust it'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    src = resolve_checkpoint(args.src)
    checkpoint = load_checkpoint_file(src, args.allow_pickle)
    weights = get_state_dict(checkpoint)
    try:
        print(f'{src}: {detect_layout(weights)}')
        converted = convert(weights, args.to, args.encoder_only)
    except InputError as error:
        raise InputError(f'{src}: {error}') from error
    if args.to in ('mmmilan', 'openmmlab'):
        meta = checkpoint.get('meta')
        save_checkpoint_file({'state_dict': converted, 'meta': meta if isinstance(meta, dict) else {}}, args.dst)
    else:
        save_checkpoint_file({'model': converted} if args.to == 'official' else converted, args.dst)
    print(f'{args.dst}: {len(converted)} weights in the layout of {TITLE[args.to]}')


if __name__ == '__main__':
    with exit_on_input_error():
        main()
