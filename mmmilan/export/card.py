"""The description of a published model: its metafile entry and its model cards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmmilan.checkpoints.download import file_sha256
from mmmilan.checkpoints.layouts import Layout
from mmmilan.checkpoints.zoo import zoo_models

PAPERS = {
    'MILAN': ('MILAN: Masked Image Pretraining on Language Assisted Representation', '2208.06049'),
    'MaskCLIP': ('MaskCLIP: Masked Self-Distillation Advances Contrastive Language-Image Pretraining', '2208.12262'),
    'MAE': ('Masked Autoencoders Are Scalable Vision Learners', '2111.06377'),
}
# The paper's appendix A.4 and A.5, shortened.
LIMITS = (
    'Limitations: features carry the biases of the images they were learned from. The targets are those of a CLIP, '
    'which was trained on uncurated English captions: images from where no English is spoken may be served worse.'
)
# Folder in which configs expect a public data set -> (name, identifier on the Hugging Face Hub).
DATA_SETS = {
    'data/imagenet': ('ImageNet-1k', 'imagenet-1k'),
    'data/yfcc15m': ('YFCC15M', None),
    'data/flickr30k': ('Flickr30k', None),
}


@dataclass
class Facts:
    """What is known about a model. What is None is unknown and is left out of the cards.

    Attributes:
        name: name of the model.
        layout: layout and content of its checkpoint.
        method: a key of ``PAPERS``: how the model, or the encoder that it was initialised from, was pretrained.
        training_data: name of the data set.
        hub_dataset: identifier of the data set on the Hugging Face Hub.
        kind: 'classifier', 'encoder' or 'image-text model'.
        parameters: number of parameters.
        epochs: number of epochs of training.
        metrics: name -> value of each result.
        metrics_dataset: name of the data set on which they were measured.
    """

    name: str
    layout: Layout
    method: str | None
    training_data: str | None
    hub_dataset: str | None
    kind: str
    parameters: int
    epochs: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_dataset: str | None = None


def pretraining_method(config: Config) -> str | None:
    """The method of a pretraining config, or of the zoo's model that a downstream config starts from; None: unknown."""
    model = config.model
    kind = model.type.rpartition('.')[2]
    if kind == 'MaskCLIP':
        return 'MaskCLIP'
    if kind == 'MILAN':
        parts = [model[part].type.rpartition('.')[2] for part in ('masking', 'neck', 'head')]
        return 'MAE' if parts == ['RandomMasking', 'MAEDecoder', 'PixelTarget'] else 'MILAN'
    start = (model.backbone.get('init_cfg') or {}).get('checkpoint')
    return zoo_models()[start].collection if start in zoo_models() else None


def training_data(config: Config) -> tuple[str | None, str | None]:
    """Name and Hub identifier of the data set that a config trains on; None for a user's own data."""
    dataset = (config.get('train_dataloader') or {}).get('dataset') or {}
    root = str(dataset.get('data_root') or '')
    found = (names for folder, names in DATA_SETS.items() if root == folder or root.startswith(f'{folder}/'))
    return next(found, (None, None))


def metafile_entry(facts: Facts, weights: str, config: str, sha256: str) -> dict[str, Any]:
    """An entry of a metafile in OpenMMLab's form."""
    metadata: dict[str, Any] = dict(Parameters=facts.parameters, SHA256=sha256)
    metadata |= {'Epochs': facts.epochs} if facts.epochs is not None else {}
    metadata |= {'Training Data': facts.training_data} if facts.training_data else {}
    entry = {'Name': facts.name, 'Metadata': metadata}
    entry |= {'In Collection': facts.method} if facts.method in ('MILAN', 'MaskCLIP') else {}
    tasks = {'classifier': 'Image Classification', 'encoder': 'Self-Supervised Image Classification'}
    task = tasks.get(facts.kind, 'Zero-Shot Image Classification')
    result = dict(Task=task, Dataset=facts.metrics_dataset, Metrics=facts.metrics)
    return entry | {'Results': [result] if facts.metrics else None, 'Weights': weights, 'Config': config}


def model_card(facts: Facts, path: Path) -> str:
    """The model card of the weights at ``path``, in Markdown."""
    lines = [f'{facts.layout}, {facts.parameters:,} parameters, trained with mmmilan.']
    if facts.method:
        title, arxiv = PAPERS[facts.method]
        by = 'Pretrained by' if facts.kind != 'classifier' else 'Its encoder was pretrained by'
        lines.append(f'{by} {facts.method}: [{title}](https://arxiv.org/abs/{arxiv}).')
    lines.append(f'Training data: {facts.training_data or "not stated"}.')
    lines += [LIMITS] if facts.method in ('MILAN', 'MaskCLIP') else []
    results = 'No results are given.\n'
    if facts.metrics:
        rows = [f'| {metric} ({facts.metrics_dataset}) | {value:g} |\n' for metric, value in facts.metrics.items()]
        results = f'| result | value |\n|---|---|\n{"".join(rows)}'
    files = ''.join(f'| {file.name} | {file_sha256(file)} |\n' for file in (path, path.with_suffix('.safetensors')))
    code = f"import mmmilan\n\nmodel = mmmilan.get_model('{path.name}')  # its config, {path.stem}.py, lies beside it"
    if facts.kind == 'image-text model':
        code = f"import mmmilan\n\nfeatures = mmmilan.FeatureExtractor('{path.name}')(['image.jpg'])"
    return (
        f'# {facts.name}\n\n' + '\n'.join(lines) + f'\n\n{results}\n| file | SHA-256 |\n|---|---|\n{files}\n'
        f'```python\n{code}\n```\n'
    )


SNIPPETS = {
    'timm': "import timm\n\nmodel = timm.create_model('hf-hub:OWNER/NAME', pretrained=True)",
    'transformers': 'from transformers import AutoModel  # 4.53 or later\n\n'
    "model = AutoModel.from_pretrained('OWNER/NAME', add_pooling_layer=False)",
    'transformers classifier': 'from transformers import AutoModelForImageClassification  # 4.53 or later\n\n'
    "model = AutoModelForImageClassification.from_pretrained('OWNER/NAME')",
    'open_clip': 'import open_clip\n\n'
    "model, _, preprocess = open_clip.create_model_and_transforms('hf-hub:OWNER/NAME')",
}
TAGS = {
    'classifier': 'image-classification',
    'encoder': 'image-feature-extraction',
    'image-text model': 'zero-shot-image-classification',
}


def hub_card(facts: Facts, card: str, libraries: list[str]) -> str:
    """The model card with the Hub's metadata header, and the code by which each library loads the folder."""
    header = [f'library_name: {libraries[0]}', f'pipeline_tag: {TAGS[facts.kind]}']
    header += [f'tags: [{facts.method.lower()}]'] if facts.method else []
    header += [f'datasets: [{facts.hub_dataset}]'] if facts.hub_dataset else []
    names = [
        'transformers classifier' if library == 'transformers' and facts.kind == 'classifier' else library
        for library in libraries
    ]
    return '---\n' + '\n'.join(header) + '\n---\n' + card + ''.join(f'\n```python\n{SNIPPETS[n]}\n```\n' for n in names)
