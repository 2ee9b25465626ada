"""Prepare a checkpoint for publication: weights only, hash in the name, safetensors copy, metafile entry, model card.

With --hub-dir it also writes a folder for the Hugging Face Hub, from which timm and transformers load the model.
"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
import hashlib
import io
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from torch import Tensor

from mmmilan.api.models import get_model, is_checkpoint
from mmmilan.checkpoints.config import config_text, own_config, place_data_preprocessor, read_config_file
from mmmilan.checkpoints.download import file_sha256
from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.layouts import convert, detect_layout
from mmmilan.checkpoints.zoo import zoo_root
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.export.preprocessing import read_preprocessing
from mmmilan.export.publish import (
    FILES,
    OPEN_CLIP_FILES,
    Facts,
    hub_card,
    metafile_entry,
    model_card,
    pretraining_method,
    training_data,
    write_hub_dir,
    write_open_clip,
)
from mmmilan.failures import build_errors
from mmmilan.files import check_name, check_output_folder, write_text

META = ('epoch', 'iter', 'seed', 'mmengine_version', 'dataset_meta')  # the other entries reveal the training machine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path, help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint of MMEngine')
    parser.add_argument('out_dir', type=Path, help='folder to write to')
    parser.add_argument('--name', help='name of the model, by default that of the config, or of its folder')
    parser.add_argument('--url', default='', help='address of the folder where the files will be, for the metafile')
    parser.add_argument('--training-data', help='name of the training data, if the config does not name a public one')
    parser.add_argument('--dataset', help='data set of the metrics, e.g. ImageNet-1k')
    parser.add_argument(
        '--metric',
        action='append',
        default=[],
        metavar='NAME=VALUE',
        help='a result that you measured (with --dataset)',
    )
    parser.add_argument('--hub-dir', type=Path, help='folder for the Hugging Face Hub')
    parser.add_argument('--overwrite', action='store_true', help='replace the files of an earlier publication')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.name = check_name(args.name or default_name(args.config))
    inputs = [args.config, args.checkpoint]
    check_output_folder(args.out_dir)
    if args.hub_dir:
        check_output_folder(args.hub_dir, {*FILES, *OPEN_CLIP_FILES, 'README.md'}, inputs, overwrite=args.overwrite)
    checkpoint = load_checkpoint_file(args.checkpoint)
    weights = convert(get_state_dict(checkpoint))
    config = read_config_file(os.fspath(args.config))
    place_data_preprocessor(config)
    facts = gather_facts(args, config, checkpoint, weights)
    public = config_text(public_config(config))

    meta = {key: value for key, value in (checkpoint.get('meta') or {}).items() if key in META}
    path = weights_path(args.out_dir, facts.name, dict(state_dict=weights, meta=meta))
    names = [path.with_suffix(ending).name for ending in ('.pth', '.safetensors', '.py', '.yml', '.md')]
    check_output_folder(args.out_dir, names, inputs, overwrite=args.overwrite)
    for ending in ('.pth', '.safetensors'):
        save_checkpoint_file(dict(state_dict=weights, meta=meta), path.with_suffix(ending))
    write_text(path.with_suffix('.py'), public)
    url = f'{args.url.rstrip("/")}/{path.name}' if args.url else path.name
    entry = metafile_entry(facts, url, entry_config(args.config, path), file_sha256(path))
    write_text(path.with_suffix('.yml'), yaml.safe_dump({'Models': [entry]}, sort_keys=False))
    card = model_card(facts, path)
    write_text(path.with_suffix('.md'), card)
    print(f'{path} and its .safetensors, .py, .yml and .md: {facts.layout}')

    if args.hub_dir:
        libraries = write_hub(args.hub_dir, facts, path, args.overwrite)
        write_text(args.hub_dir / 'README.md', hub_card(facts, card, libraries))
        print(f'{args.hub_dir}: can be loaded by {" and ".join(libraries)}')


def default_name(config: Path) -> str:
    """The name of the config, or of its folder if it is the ``config.py`` of a run."""
    return config.resolve().parent.name if config.name == 'config.py' else config.stem


def gather_facts(args: argparse.Namespace, config: Config, checkpoint: dict[str, Any], weights: dict) -> Facts:
    """Collect the facts from arguments, config and checkpoint, whose own config names the training data."""
    meta = checkpoint.get('meta') or {}
    trained_with = own_config(args.checkpoint) if isinstance(meta.get('cfg'), str) else config
    data, hub_dataset = training_data(trained_with)
    if args.metric and not args.dataset:
        raise InputError('--metric needs its data set; name it with --dataset.')
    layout = detect_layout(weights)
    kind = 'image-text model' if layout.content == 'MaskCLIP' else 'encoder'
    if config.model.get('head') and 'masking' not in config.model:
        kind = 'classifier'
    return Facts(
        name=args.name,
        layout=layout,
        method=pretraining_method(config),
        training_data=args.training_data or data,
        hub_dataset=None if args.training_data else hub_dataset,
        kind=kind,
        parameters=count_parameters(weights),
        epochs=meta.get('epoch'),
        metrics=dict(read_metric(text) for text in args.metric),
        metrics_dataset=args.dataset,
    )


def public_config(config: Config) -> Config:
    """The part of a config that the model needs, without folders of the training machine."""
    model = config.model.to_dict()
    model['backbone'].pop('init_cfg', None)
    head = model.get('head') or {}
    for part in (head, *head.get('targets', [])):
        if isinstance(teacher := part.get('teacher'), str):
            part['teacher'] = without_folders(teacher)
        elif teacher:
            teacher.update({key: without_folders(value) for key, value in teacher.items() if isinstance(value, str)})
    dataset = config.test_dataloader.dataset.to_dict()
    dataset = {key: dataset[key] for key in ('type', 'pipeline', 'metainfo') if key in dataset}
    return Config(dict(default_scope=config.default_scope, model=model, test_dataloader=dict(dataset=dataset)))


def without_folders(name: str) -> str:
    """The name of a teacher, or of its weights, without the folders of a file."""
    before, separator, path = name.rpartition(':')
    is_path = os.path.isabs(path) or is_checkpoint(path)
    return f'{before}{separator}{Path(path).name}' if is_path and '://' not in name else name


def entry_config(config: Path, path: Path) -> str:
    """The config for the metafile: the path in the zoo if it is there, else the file published with the weights."""
    root = zoo_root().resolve()
    inside = [base for base in (root, root.parents[1]) if config.resolve().is_relative_to(base / 'configs')]
    return str(config.resolve().relative_to(inside[0])) if inside else path.with_suffix('.py').name


def write_hub(folder: Path, facts: Facts, path: Path, overwrite: bool) -> list[str]:
    """Write the folder for the Hub; returns the libraries that can load it."""
    if facts.kind == 'image-text model':
        model = get_model(path, encoder_only=False)
        write_open_clip(model, read_preprocessing(model._config, model), folder, overwrite=overwrite)
        return ['open_clip']
    return write_hub_dir(folder, get_model(path), facts.name, overwrite=overwrite)


def read_metric(text: str) -> tuple[str, float]:
    """Parse NAME=VALUE.

    Raises:
        InputError: NAME is empty, or VALUE is not a number.
    """
    name, _, value = text.rpartition('=')
    with suppress(ValueError):
        if name.strip() and math.isfinite(float(value)):
            return name.strip(), float(value)
    raise InputError(f'--metric {text} is not NAME=VALUE; give e.g. "Top 1 Accuracy=85.4".')


def weights_path(folder: Path, name: str, checkpoint: dict[str, Any]) -> Path:
    """``NAME-HASH.pth``, with the hash that the file will have."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    return folder / f'{name}-{hashlib.sha256(content.getbuffer()).hexdigest()[:8]}.pth'


def count_parameters(weights: dict[str, Tensor]) -> int:
    """The number of parameters, without the statistics of batch norm."""
    return sum(value.numel() for key, value in weights.items() if '.bn.' not in key)


if __name__ == '__main__':
    with exit_on_input_error(), build_errors():
        main()
