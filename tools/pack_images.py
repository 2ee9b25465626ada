"""Pack a folder of images into one LMDB: python tools/pack_images.py data/imagenet/train data/imagenet/train.lmdb"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
from pathlib import Path

from mmmilan.datasets.decoding import EXTENSIONS
from mmmilan.datasets.listing import list_folder
from mmmilan.datasets.packed import pack_images
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.failures import build_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='folder of images, flat or nested')
    parser.add_argument('database', type=Path, help='the LMDB to write')
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise InputError(f'The folder {args.folder} does not exist; correct its path.')
    paths = [args.folder / path for path in list_folder(args.folder, EXTENSIONS).files]
    if not paths:
        raise InputError(f'The folder {args.folder} holds no image; choose one that does.')
    pack_images(args.folder, paths, args.database)


if __name__ == '__main__':
    with exit_on_input_error(), build_errors():
        main()
