"""Run the teacher of a config once for all images and E epochs of crops, and store its outputs in 8 bits.

python tools/cache_targets.py configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py cache --epochs 10

Run it again to resume. docs/efficiency.md describes how to train with a cache, and its costs.
"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import DATASETS, FUNCTIONS, MODELS, init_default_scope
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from mmmilan.building import change_config
from mmmilan.checkpoints.config import place_data_preprocessor, read_config_file
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.datasets import Draw, ImageFolder
from mmmilan.engine.config_check import check_is_not_read
from mmmilan.errors import InputError, count, exit_on_input_error
from mmmilan.failures import build_errors
from mmmilan.files import atomic_write, check_output_folder, write_text
from mmmilan.models import MILAN
from mmmilan.teachers import teacher_config
from mmmilan.teachers.cached import VERSION, CachedTargets, as_json, checksum_of_names, encode, read_manifest


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='pretraining config, with a teacher')
    parser.add_argument('folder', type=Path, help='folder of the cache')
    parser.add_argument('--epochs', type=int, required=True, help='epochs of crops; training starts over after them')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE pairs merged into the config')
    args = parser.parse_args()
    check_output_folder(args.folder)
    if args.epochs < 1:
        raise InputError(f'--epochs {args.epochs} leaves nothing to cache; choose 1 or more.')
    return args


def describe(cfg: Config, model: MILAN, dataset: ImageFolder) -> dict:
    """The manifest without the number of epochs: what must agree between a cache and the training that uses it."""
    teacher = model.head.teacher
    return dict(
        version=VERSION,
        teacher=as_json(teacher_config(cfg.model.to_dict()['head']['teacher'])),
        pipeline=as_json([step.to_dict() for step in cfg.train_dataloader.dataset.pipeline]),
        images=len(dataset),
        names=checksum_of_names(dataset),
        seed=cfg.get('randomness', {}).get('seed') or 0,
        feature_dim=model.head.feature_dim,
        num_patches=teacher.num_patches,
        width=teacher.width,
        patch_size=teacher.patch_size,
        grid=list(teacher.grid),
        input_size=as_json(teacher.input_size),
    )


def finished_epochs(folder: Path, wanted: dict) -> int:
    """The number of epochs of this cache that are in the folder already.

    Raises:
        InputError: the folder holds another cache.
    """
    if not os.path.lexists(folder / 'manifest.json'):
        check_output_folder(folder, ['epoch_0.bin'])  # may be another's
        return 0
    found = read_manifest(folder)
    other = [key for key, value in wanted.items() if found.get(key) != value]
    if other:
        raise InputError(f'{folder} holds a cache of another {", ".join(other)}; choose another folder.')
    return found['epochs']


@torch.no_grad()
def run_teacher(model: MILAN, batch: dict) -> tuple[Tensor, Tensor]:
    """Features [B, 1 + N, C] and importance [B, N] of a batch.

    Raises:
        InputError: the target of the head is not the features of a single teacher.
    """
    features, importance = model.head.run_teacher(model.data_preprocessor(batch)['inputs'])
    if not isinstance(features, Tensor):
        raise InputError('Only a head with one teacher as its target can be cached; take CLIPTarget or LayerAlignment.')
    return features, importance


def rounding_loss(features: Tensor, records: np.ndarray) -> float:
    """2 - 2 cos between features and their 8-bit codes, mean over tokens: the loss of a perfect prediction."""
    codes = torch.from_numpy(records['codes']).to(features)
    return float((2 - 2 * F.cosine_similarity(codes, features.float(), dim=-1)).mean())


def write_epoch(path: Path, model: MILAN, loader: DataLoader, epoch: int) -> float:
    """Write the records of an epoch; returns the loss that rounding alone causes, on the last batch."""
    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        for batch in track(loader, f'Epoch {epoch}'):
            features, importance = run_teacher(model, batch)
            records = encode(batch['inputs'], features, importance)
            file.write(records.tobytes())
    return rounding_loss(features, records)


def write_manifest(folder: Path, manifest: dict, epochs: int) -> None:
    """Write the manifest with the number of complete epochs; it says that the files in the folder are ours."""
    write_text(folder / 'manifest.json', json.dumps(manifest | dict(epochs=epochs), indent=2) + '\n')


def main() -> None:
    args = parse_args()
    use_safe_loading()
    cfg = read_config_file(args.config)
    change_config(cfg, args.cfg_options or {})
    place_data_preprocessor(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    if not (cfg.model.get('head') or {}).get('teacher'):
        raise InputError(f'{args.config} has no model.head.teacher; take a config with one.')
    model = MODELS.build(cfg.model).to(get_device()).eval()
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    if isinstance(dataset, CachedTargets):
        raise InputError(f'{args.config} trains with a cache already; take the config that the cache was made with.')
    check_is_not_read(args.folder, cfg)
    manifest = describe(cfg, model, dataset)
    first = finished_epochs(args.folder, manifest)
    if not first:
        write_manifest(args.folder, manifest, 0)
    for epoch in range(first, args.epochs):
        loader = DataLoader(
            dataset,
            cfg.train_dataloader.batch_size,
            sampler=[Draw(manifest['seed'], epoch, i) for i in range(len(dataset))],
            num_workers=cfg.train_dataloader.num_workers,
            collate_fn=FUNCTIONS.get('default_collate'),
        )
        loss = write_epoch(args.folder / f'epoch_{epoch}.bin', model, loader, epoch)
        write_manifest(args.folder, manifest, epoch + 1)
        print(f'Epoch {epoch}: rounding to 8 bits alone causes a loss of {loss:.2e} (2 - 2 cos).')
    size = (args.folder / 'epoch_0.bin').stat().st_size
    print(f'{args.folder}: {count(args.epochs, "epoch")}, {size / len(dataset) / 1e3:.1f} KB per image and epoch.')


if __name__ == '__main__':
    with exit_on_input_error(), build_errors():
        main()
