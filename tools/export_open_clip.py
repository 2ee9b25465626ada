"""Export a MaskCLIP checkpoint to a folder that open_clip loads by the name local-dir:FOLDER."""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
from pathlib import Path

from mmmilan.api.models import get_model, read_config
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.export.preprocessing import read_preprocessing
from mmmilan.export.publish import OPEN_CLIP_FILES, write_open_clip
from mmmilan.failures import build_errors
from mmmilan.files import check_output_folder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path, help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', type=Path, help='checkpoint of MMEngine')
    parser.add_argument('folder', type=Path, help='folder for open_clip_config.json and the weights')
    parser.add_argument('--overwrite', action='store_true', help='replace these files if they exist')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_output_folder(args.folder, OPEN_CLIP_FILES, [args.config, args.checkpoint], overwrite=args.overwrite)
    config = read_config(args.config)
    kind = config.model.type.rpartition('.')[2]
    if kind != 'MaskCLIP':
        raise InputError(f'{args.config} is a config of {kind}; give one of MaskCLIP.')
    model = get_model(args.config, args.checkpoint, encoder_only=False)
    write_open_clip(model, read_preprocessing(config, model), args.folder, overwrite=args.overwrite)
    print(f"open_clip.create_model_and_transforms('local-dir:{args.folder}') loads the model.")


if __name__ == '__main__':
    with exit_on_input_error(), build_errors():
        main()
