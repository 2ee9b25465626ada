"""Make an open_clip model of a MaskCLIP checkpoint, which open_clip loads by the name local-dir:FOLDER."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.checkpoints.loading import load_weights
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.export.open_clip import write_open_clip
from mmmilan.models import MaskCLIP
from mmmilan.registry import MODELS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=Path, help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', type=Path, help='checkpoint of MMEngine')
    parser.add_argument('folder', type=Path, help='folder to write open_clip_config.json and the weights to')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not args.config.is_file():
        raise InputError(f'The config {args.config} does not exist; correct its path.')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromfile(args.config).model)
    if not isinstance(model, MaskCLIP):
        raise InputError(f'{args.config} is a config of {type(model).__name__}; give one of MaskCLIP.')
    load_weights(model, load_checkpoint_file(args.checkpoint), str(args.checkpoint))
    write_open_clip(model, args.folder)
    print(f"open_clip.create_model_and_transforms('local-dir:{args.folder}') loads the model.")


if __name__ == '__main__':
    with exit_on_input_error():
        main()
