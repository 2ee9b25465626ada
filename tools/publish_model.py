"""Make a checkpoint ready to publish: weights alone, hash in the name, safetensors twin, metafile entry, model card.

With --hub-dir also a folder for the Hugging Face Hub, from which timm and transformers load the model.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from mmmilan.api.models import get_model
from mmmilan.checkpoints.download import file_sha256
from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.layouts import Layout, convert, detect_layout
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.export.hub import write_hub_dir
from mmmilan.files import write_text

META = ('epoch', 'iter', 'seed', 'mmengine_version', 'dataset_meta')  # the rest names the machine it was trained on


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path, help='config that the checkpoint was trained with; its name is the model')
    parser.add_argument('checkpoint', help='checkpoint of MMEngine')
    parser.add_argument('out_dir', type=Path, help='folder to write to')
    parser.add_argument('--name', help='name of the model, by default that of the config')
    parser.add_argument('--url', default='', help='address that the files will be below, for the metafile')
    parser.add_argument('--task', default='Image Classification', help='of the metrics (default: %(default)s)')
    parser.add_argument('--dataset', default='ImageNet-1k', help='of the metrics (default: %(default)s)')
    parser.add_argument(
        '--metric', action='append', default=[], metavar='NAME=VALUE', help='a result that you measured'
    )
    parser.add_argument('--hub-dir', type=Path, help='folder for the Hugging Face Hub')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    name = args.name or args.config.stem
    checkpoint = load_checkpoint_file(args.checkpoint)
    weights = convert(get_state_dict(checkpoint))
    meta = {key: value for key, value in checkpoint.get('meta', {}).items() if key in META}
    metrics = dict(read_metric(text) for text in args.metric)

    path = write_weights(args.out_dir / f'{name}.pth', weights, meta)
    metadata = {'Parameters': count_parameters(weights), 'SHA256': file_sha256(path)}
    if 'epoch' in meta:
        metadata['Epochs'] = meta['epoch']
    result = {'Task': args.task, 'Dataset': args.dataset, 'Metrics': metrics}
    entry = {
        'Name': name,
        'Metadata': metadata,
        'In Collection': 'MILAN',
        'Results': [result] if metrics else None,
        'Weights': f'{args.url.rstrip("/")}/{path.name}' if args.url else path.name,
        'Config': os.path.relpath(args.config),
    }
    write_text(path.with_suffix('.yml'), yaml.safe_dump({'Models': [entry]}, sort_keys=False))
    card = model_card(entry, path, detect_layout(weights))
    write_text(path.with_suffix('.md'), card)
    print(f'{path} and its .safetensors, .yml and .md: {detect_layout(weights)}')

    if args.hub_dir:
        libraries = write_hub_dir(args.hub_dir, get_model(args.config, pretrained=path), name)
        write_text(args.hub_dir / 'README.md', hub_card(card, libraries))
        print(f'{args.hub_dir}: can be loaded by {" and ".join(libraries)}')


def read_metric(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition('=')
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f'--metric {text} is not NAME=VALUE, e.g. "Top 1 Accuracy=85.4"') from None


def write_weights(path: Path, weights: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write ``NAME-HASH.pth`` and its safetensors twin; returns the path of the first."""
    save_checkpoint_file({'state_dict': weights, 'meta': meta}, path)
    final = path.with_name(f'{path.stem}-{file_sha256(path)[:8]}.pth')
    os.replace(path, final)
    save_checkpoint_file({'state_dict': weights, 'meta': meta}, final.with_suffix('.safetensors'))
    return final


def count_parameters(weights: dict[str, Tensor]) -> int:
    return sum(value.numel() for key, value in weights.items() if '.bn.' not in key)  # its statistics are not learned


def model_card(entry: dict[str, Any], path: Path, layout: Layout) -> str:
    """A description of a metafile's entry for people, in Markdown."""
    results = 'No result was given.\n'
    if entry['Results']:
        result = entry['Results'][0]
        rows = [f'| {metric} ({result["Dataset"]}) | {value:g} |\n' for metric, value in result['Metrics'].items()]
        results = f'| result | value |\n|---|---|\n{"".join(rows)}'
    safetensors = path.with_suffix('.safetensors')
    return f"""# {entry['Name']}

{layout}, {entry['Metadata']['Parameters']:,} parameters, trained with mmmilan
([MILAN: masked image pretraining on language assisted representation](https://arxiv.org/abs/2208.06049)).

{results}
| file | SHA-256 |
|---|---|
| {path.name} | {entry['Metadata']['SHA256']} |
| {safetensors.name} | {file_sha256(safetensors)} |

```python
import mmmilan

model = mmmilan.get_model('{entry['Config']}', pretrained='{path.name}')
```
"""


def hub_card(card: str, libraries: list[str]) -> str:
    """The model card with the header that the Hub reads, and how each library loads the folder."""
    snippets = {
        'timm': "import timm\n\nmodel = timm.create_model('hf-hub:OWNER/NAME', pretrained=True)",
        'transformers': 'from transformers import AutoModel  # 4.53 or later\n\n'
        "model = AutoModel.from_pretrained('OWNER/NAME', add_pooling_layer=False)",
    }
    header = '---\nlibrary_name: timm\ntags: [image-feature-extraction, milan]\ndatasets: [imagenet-1k]\n---\n'
    return header + card + ''.join(f'\n```python\n{snippets[library]}\n```\n' for library in libraries)


if __name__ == '__main__':
    with exit_on_input_error():
        main()
