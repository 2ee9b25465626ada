"""What a model is published with: folders for the Hugging Face Hub, its metafile entry and its model cards.

A folder is of a ViT, for timm and transformers, or of MaskCLIP, for open_clip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import Config
from mmpretrain.models import ImageClassifier, VisionTransformer

from mmmilan.checkpoints.download import file_sha256
from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.checkpoints.layouts import NORM_EPS, Layout, convert, detect_layout, to_open_clip
from mmmilan.checkpoints.zoo import zoo_models
from mmmilan.components import type_name
from mmmilan.evaluation.predictions import all_names
from mmmilan.export.preprocessing import Preprocessing, read_preprocessing
from mmmilan.files import check_output_folder, write_text

if TYPE_CHECKING:
    from mmmilan.models.maskclip import MaskCLIP

FILES = ('model.safetensors', 'transformers.safetensors', 'preprocessor_config.json', 'config.json')
OPEN_CLIP_FILES = ('open_clip_config.json', 'open_clip_model.safetensors')


def write_hub_dir(folder: Path, model: ImageClassifier, name: str, *, overwrite: bool = False) -> list[str]:
    """Write weights and configs for timm and, unless the model is a classifier on the mean token, for transformers.

    Args:
        folder: folder to write. ``model.safetensors`` is in timm's layout, ``transformers.safetensors`` in that of
            transformers (>= 4.53, which finds the name of this file in ``config.json``).
        model: an encoder or classifier as ``mmmilan.get_model`` returns it.
        name: name of the model in the configs.
        overwrite: replace these files.

    Returns:
        The libraries that can load the folder.

    Raises:
        InputError: timm lacks a part of the model, such as the batch norm of a linear probe, or the preprocessing
            cannot be expressed in timm or transformers, or the names of the classes are not as many as the classes, or
            the files must not or cannot be written.
    """
    check_output_folder(folder, FILES, overwrite=overwrite)
    preprocessing = read_preprocessing(model._config, model)
    config, libraries = _timm_config(model, name, preprocessing), ['timm']
    weights = model.state_dict()
    save_checkpoint_file(convert(weights, 'timm'), folder / 'model.safetensors')
    if detect_layout(weights).content != 'classifier on the mean token':
        save_checkpoint_file(convert(weights, 'huggingface'), folder / 'transformers.safetensors')
        # transformers reads the preprocessing from config.json if the folder is local and timm can load it too, and
        # from preprocessor_config.json if it is a repository of the Hub
        config |= _transformers_config(model) | preprocessing.transformers()
        write_text(folder / 'preprocessor_config.json', json.dumps(preprocessing.transformers(), indent=2))
        libraries.append('transformers')
    write_text(folder / 'config.json', json.dumps(config, indent=2))
    return libraries


def _timm_config(model: ImageClassifier, name: str, preprocessing: Preprocessing) -> dict[str, Any]:
    vit = model.backbone
    classes = model.head.num_classes if model.with_head else 0
    labels = {'label_names': list(all_names(model, 'classification'))} if model.with_head else {}
    return labels | {
        'architecture': 'vit_base_patch16_224',  # for all sizes, which ``model_args`` sets
        'num_classes': classes,
        'num_features': vit.embed_dims,
        'model_args': {
            'img_size': list(vit.img_size),
            'patch_size': _patch_size(vit),
            'embed_dim': vit.embed_dims,
            'depth': vit.num_layers,
            'num_heads': vit.arch_settings['num_heads'],
            'mlp_ratio': vit.arch_settings['feedforward_channels'] / vit.embed_dims,
            'global_pool': 'avg' if vit.out_type == 'avg_featmap' else 'token',
        },
        'pretrained_cfg': {
            'tag': name,
            'fixed_input_size': True,
            **preprocessing.timm(),
            'num_classes': classes,
            'pool_size': None,
            'first_conv': 'patch_embed.proj',
            'classifier': 'head',
        },
    }


def _transformers_config(model: ImageClassifier) -> dict[str, Any]:
    vit = model.backbone
    config = {
        'architectures': ['ViTForImageClassification' if model.with_head else 'ViTModel'],
        'model_type': 'vit',
        'transformers_weights': 'transformers.safetensors',
        'hidden_size': vit.embed_dims,
        'num_hidden_layers': vit.num_layers,
        'num_attention_heads': vit.arch_settings['num_heads'],
        'intermediate_size': vit.arch_settings['feedforward_channels'],
        'image_size': list(vit.img_size),
        'patch_size': _patch_size(vit),
        'layer_norm_eps': vit.ln1.eps,
        'hidden_act': 'gelu',
        'qkv_bias': True,
    }
    if model.with_head:
        names = all_names(model, 'classification')
        config['id2label'] = {str(i): label for i, label in enumerate(names)}
        config['label2id'] = {label: i for i, label in enumerate(names)}
    return config


def _patch_size(vit: VisionTransformer) -> int:
    return vit.patch_embed.projection.kernel_size[0]


def write_open_clip(
    model: MaskCLIP, preprocessing: Preprocessing, folder: str | Path, *, overwrite: bool = False
) -> None:
    """Write a model so that ``open_clip.create_model_and_transforms('local-dir:FOLDER')`` loads it.

    Args:
        model: The model; in ``open_clip`` it gives the same embeddings.
        preprocessing: The preprocessing of its images.
        folder: Folder to write ``open_clip_config.json`` and ``open_clip_model.safetensors`` to.
        overwrite: Replace these files.

    Raises:
        InputError: the encoder is not a plain ViT, its preprocessing cannot be expressed in open_clip, or the files
            must not or cannot be written.
    """
    folder = check_output_folder(folder, OPEN_CLIP_FILES, overwrite=overwrite)
    config = dict(model_cfg=open_clip_config(model), preprocess_cfg=preprocessing.open_clip())
    save_checkpoint_file(to_open_clip(model.state_dict()), folder / 'open_clip_model.safetensors')
    write_text(folder / 'open_clip_config.json', json.dumps(config, indent=2))


def open_clip_config(model: MaskCLIP) -> dict[str, Any]:
    """The architecture of a model as a config of open_clip."""
    arch = model.backbone.arch_settings
    height, width = model.backbone.img_size
    vision = dict(
        image_size=height if height == width else [height, width],
        patch_size=_patch_size(model.backbone),
        width=arch['embed_dims'],
        layers=arch['num_layers'],
        head_width=arch['embed_dims'] // arch['num_heads'],
        mlp_ratio=arch['feedforward_channels'] / arch['embed_dims'],
        no_ln_pre=True,
        norm_kwargs=dict(eps=NORM_EPS),
    )
    return dict(embed_dim=model.image_projection.out_features, vision_cfg=vision, text_cfg=dict(model.text_cfg))


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
    kind = type_name(model)
    if kind == 'MaskCLIP':
        return 'MaskCLIP'
    if kind == 'MILAN':
        parts = [type_name(model[part]) for part in ('masking', 'neck', 'head')]
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
