"""Run the teacher of a config on some crops of all images, and store its outputs in 8 bits.

python tools/cache_targets.py configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py cache --epochs 10

Run it again to resume, or to mend it. docs/efficiency.md describes how to train with a cache, and its costs.
"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
from pathlib import Path

from mmengine.config import DictAction
from mmengine.device import get_device
from mmengine.registry import DATASETS, FUNCTIONS, MODELS, init_default_scope
from rich.progress import track
from torch.utils.data import DataLoader

from mmmilan.building import change_config
from mmmilan.checkpoints.config import place_data_preprocessor, read_config_file
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.components import type_name
from mmmilan.datasets import Draw
from mmmilan.engine.config_check import check_is_not_read
from mmmilan.engine.teacher_cache import check_space, manifest_of, recall_or_run
from mmmilan.errors import InputError, count, exit_on_input_error
from mmmilan.failures import build_errors
from mmmilan.files import check_output_folder
from mmmilan.teachers.cache import MASKING, TeacherCache, make_cache


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='pretraining config, with a teacher')
    parser.add_argument('folder', type=Path, help='folder of the cache')
    parser.add_argument('--epochs', type=int, required=True, help='crops of an image (train_dataloader.sampler.crops)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE pairs merged into the config')
    args = parser.parse_args()
    check_output_folder(args.folder)
    if args.epochs < 1:
        raise InputError(f'--epochs {args.epochs} leaves nothing to cache; choose 1 or more.')
    return args


def main() -> None:
    args = parse_args()
    use_safe_loading()
    cfg = read_config_file(args.config)
    change_config(cfg, args.cfg_options or {})
    place_data_preprocessor(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline = [step for step in dataset.pipeline if not type_name(step).endswith(MASKING)]  # needs the cache
    model = MODELS.build(cfg.model).to(get_device()).eval()
    dataset = DATASETS.build(dataset)
    check_is_not_read(args.folder, cfg)
    seed = cfg.get('randomness', {}).get('seed') or 0
    make_cache(args.folder, manifest_of(cfg, model, dataset, seed))
    cache = TeacherCache(args.folder)
    check_space(cache, args.epochs)
    for crop in range(args.epochs):
        loader = DataLoader(
            dataset,
            cfg.train_dataloader.batch_size,
            sampler=[Draw(seed, crop, i) for i in range(len(dataset))],
            num_workers=cfg.train_dataloader.num_workers,
            collate_fn=FUNCTIONS.get('default_collate'),
        )
        for batch in track(loader, f'Crop {crop + 1} of {args.epochs}'):
            recall_or_run(cache, model, crop, batch)
    print(f'{args.folder}: {count(args.epochs, "crop")} of each image, {cache.dtype.itemsize / 1e3:.1f} KB each.')


if __name__ == '__main__':
    with exit_on_input_error(), build_errors():
        main()
