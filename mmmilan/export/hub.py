"""Folders for the Hugging Face Hub: of a ViT for timm and transformers, of MaskCLIP for open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpretrain.models import ImageClassifier, VisionTransformer

from mmmilan.checkpoints.io import save_checkpoint_file
from mmmilan.checkpoints.layouts import convert, detect_layout
from mmmilan.checkpoints.open_clip_layout import NORM_EPS, to_open_clip
from mmmilan.export.preprocessing import Preprocessing, read_preprocessing
from mmmilan.files import check_output_folder, write_text

if TYPE_CHECKING:
    from mmmilan.export.preprocessing import Preprocessing
    from mmmilan.models.maskclip import MaskCLIP

FILES = ('model.safetensors', 'transformers.safetensors', 'preprocessor_config.json', 'config.json')


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
            cannot be expressed in timm or transformers, or the files must not or cannot be written.
    """
    check_output_folder(folder, FILES, overwrite=overwrite)
    preprocessing = read_preprocessing(model._config, model)
    weights = model.state_dict()
    save_checkpoint_file(convert(weights, 'timm'), folder / 'model.safetensors')
    config, libraries = _timm_config(model, name, preprocessing), ['timm']
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
    labels = {'label_names': class_names(model)} if model.with_head else {}
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
        names = class_names(model)
        config['id2label'] = {str(i): label for i, label in enumerate(names)}
        config['label2id'] = {label: i for i, label in enumerate(names)}
    return config


def class_names(model: ImageClassifier) -> list[str]:
    """The names of a classifier's classes, or numbered labels if they have no names."""
    names = list(model._dataset_meta.get('classes') or ())
    count = model.head.num_classes
    return names if len(names) == count else [f'LABEL_{i}' for i in range(count)]


def _patch_size(vit: VisionTransformer) -> int:
    return vit.patch_embed.projection.kernel_size[0]


OPEN_CLIP_FILES = ('open_clip_config.json', 'open_clip_model.safetensors')


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
        patch_size=model.backbone.patch_embed.projection.kernel_size[0],
        width=arch['embed_dims'],
        layers=arch['num_layers'],
        head_width=arch['embed_dims'] // arch['num_heads'],
        mlp_ratio=arch['feedforward_channels'] / arch['embed_dims'],
        no_ln_pre=True,
        norm_kwargs=dict(eps=NORM_EPS),
    )
    return dict(embed_dim=model.image_projection.out_features, vision_cfg=vision, text_cfg=dict(model.text_cfg))
