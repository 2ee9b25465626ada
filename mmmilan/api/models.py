"""Models of the zoo and of a user's own checkpoints, and their parameters and operations."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmilan import arguments
from mmmilan.arguments import checked
from mmmilan.checkpoints.zoo import find_config, find_model, resolve_checkpoint, zoo_models
from mmmilan.errors import InputError
from mmmilan.files import extension

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.config import Config
    from mmengine.model import BaseModel
    from torch import Tensor, nn

    from mmmilan.evaluation.features import Embedder


@checked
def list_models(pattern: str = '') -> list[str]:
    """Names of the models of the zoo that start with a pattern, e.g. ``'milan*large'``, sorted."""
    return sorted(fnmatch.filter(zoo_models(), f'{pattern}*'))


@checked
def get_model(
    name: arguments.Path,
    pretrained: bool | arguments.Path = False,
    device: arguments.Device | None = None,
    encoder_only: bool = True,
    teacher: arguments.Path | dict[str, Any] | None = None,
    **kwargs: Any,
) -> BaseModel:
    """Build a model, in evaluation mode.

    Args:
        name: a model of the zoo, a config file, or a checkpoint of your own with its config in it or beside it.
        pretrained: True for the published weights, or a checkpoint in any layout: file, URL or name. If ``name`` is a
            checkpoint, its weights are always loaded.
        device: where to put the model; by default on the CPU.
        encoder_only: from a pretraining config, build only the encoder, as an mmpretrain ``ImageClassifier`` without
            head; False also builds decoder, target and teacher.
        teacher: with ``encoder_only=False``, the teacher in place of the config's, as for ``mmmilan.pretrain``: where
            its file is now, for one.
        kwargs: changes of the config's ``model``, e.g. ``backbone=dict(out_type='featmap')``.

    Returns:
        The model. mmpretrain's inferencers accept it too.

    Raises:
        InputError: the name is unknown, weights are missing or do not fit, or the config in a checkpoint could run code
            or asks for much more memory than its weights.
    """
    from mmengine.registry import MODELS

    from mmmilan.api.recipe import replace_teacher
    from mmmilan.building import change_config, check_operators, in_scope
    from mmmilan.checkpoints.config import keep_encoder
    from mmmilan.checkpoints.foreign_config import within_weights
    from mmmilan.checkpoints.task_config import dataset_meta

    own = is_checkpoint(name)
    config = read_config(name)
    if encoder_only:
        keep_encoder(config)
    if pretrained is True and extension(name) == '.py':
        raise InputError(f'{name} is a config without weights; give a checkpoint as `pretrained`.')
    if teacher is not None:
        replace_teacher(config, teacher, name)
    source = name if isinstance(pretrained, bool) else pretrained
    weights = resolve_checkpoint(source) if pretrained or own else None  # fails before the model is built
    for key in kwargs.keys() - config.model.keys():
        if nearest := difflib.get_close_matches(key, ('pretrained', 'device', 'encoder_only'), n=1):
            raise InputError(f'get_model takes no {key}; the nearest name is {nearest[0]}.')
    change_config(config, {'model': kwargs})
    check_operators(config)
    with in_scope(config):
        with within_weights(config):
            model = MODELS.build(config.model)
        model._dataset_meta = dataset_meta(config)
    model._config, model._metainfo = config, None
    if weights is not None:
        model._dataset_meta = _load_weights(model, weights) or model._dataset_meta
    model.eval()
    return model.to(device) if device else model


def is_checkpoint(name: str | os.PathLike) -> bool:
    """Whether a name is that of a checkpoint file, not of a config or a model of the zoo."""
    kind = extension(name)
    return kind in ('.pth', '.pt', '.bin', '.safetensors') or (Path(name).is_file() and kind != '.py')


def title_of(name: str) -> str:
    """What figures and pages call a model: its name without folders, file extension and library."""
    from mmmilan.teachers.by_name import LIBRARIES

    library, _, rest = name.partition(':')
    name = rest if library in LIBRARIES else name
    if is_checkpoint(name):
        return Path(name).stem
    return Path(name).name if os.path.isdir(name.removeprefix('local-dir:')) else name


def titles_of(names: Sequence[str]) -> list[str]:
    """:func:`title_of` each model; files of one name are told apart by their folders, as in ``first/milan``.

    Raises:
        InputError: a model is named twice.
    """
    short = [title_of(name) for name in names]
    titles = list(short)
    paths = [Path(os.path.abspath(name)).with_suffix('').parts for name in names]
    for i, title in enumerate(short):
        others = [path for path, other in zip(paths, short, strict=True) if other == title and path is not paths[i]]
        if not others:
            continue
        depths = range(1, len(paths[i]))
        depth = next((d for d in depths if all(other[-d:] != paths[i][-d:] for other in others)), None)
        if depth is None or not is_checkpoint(names[i]):
            raise InputError(f'{names[i]} is named twice among the models to compare; name each once.')
        titles[i] = '/'.join(paths[i][-depth:])
    return titles


def read_config(name: str | os.PathLike) -> Config:
    """Read the config of a model of the zoo, of a config file, or of a user's own checkpoint.

    Raises:
        InputError: the file or the model does not exist, or the checkpoint has no config.
    """
    from mmmilan.checkpoints.config import own_config, place_data_preprocessor, read_config_file

    if is_checkpoint(name):
        config = own_config(name)
    else:
        config = read_config_file(find_config(name) if extension(name) == '.py' else find_model(str(name)).config)
    if not isinstance(config.get('model'), Mapping):
        raise InputError(f'The config of {name} has no model; give one that has.')
    place_data_preprocessor(config)
    return config


def build_embedder(model: BaseModel, checkpoint: str | os.PathLike) -> Embedder:
    """Build the encoder of a model, with what projects its tokens to the joint space of image and text, if it has that.

    Args:
        model: what ``get_model(checkpoint)`` returns; its backbone is used, not copied.
        checkpoint: a model of the zoo or a user's own checkpoint.

    Returns:
        The embedder, in evaluation mode and on the model's device.
    """
    from mmmilan.evaluation.features import Embedder

    joint, device = build_joint(checkpoint), next(model.parameters()).device
    return Embedder(model.backbone, joint).to(device).eval()


def build_joint(checkpoint: str | os.PathLike) -> nn.Module | None:
    """The part of a checkpoint that projects the encoder's tokens to the joint space of image and text.

    That is MaskCLIP's projection, or the decoder of a MILAN that predicts CLIP features, if the file has it.
    """
    from torch import nn

    from mmmilan.building import in_scope
    from mmmilan.checkpoints.foreign_config import within_weights
    from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
    from mmmilan.checkpoints.loading import as_mmmilan, load_weights
    from mmmilan.models.milan import joins_texts
    from mmmilan.registry import MODELS

    whole = read_config(checkpoint)
    config, is_maskclip = whole.model, whole.model.type in ('MaskCLIP', 'mmmilan.MaskCLIP')
    parts = [config.get(name) or {} for name in ('neck', 'head')]
    classes = [MODELS.get(part.type) for part in parts if 'type' in part]
    joins = len(classes) == 2 and all(map(inspect.isclass, classes)) and joins_texts(*classes)
    if not (is_maskclip or joins):
        return None
    path = resolve_checkpoint(checkpoint)
    content = load_checkpoint_file(path)
    weights = as_mmmilan(get_state_dict(content, str(path)))
    if is_maskclip:
        width, dim = reversed(weights['image_projection.weight'].shape)
        joint = nn.Linear(width, dim, bias=False)
    elif 'neck.decoder_pred.weight' in weights:
        with in_scope(), within_weights(whole):
            joint = MODELS.build(config.neck)
    else:
        return None
    load_weights(joint, content, str(path), 'image_projection' if is_maskclip else 'neck')
    return joint


def _load_weights(model: BaseModel, path: Path) -> dict:
    """Load all weights of a model from a file; returns the metainfo of the data set that it was trained on."""
    from mmmilan.checkpoints.io import get_dataset_meta, load_checkpoint_file
    from mmmilan.checkpoints.loading import load_weights

    content = load_checkpoint_file(path)
    load_weights(model, content, str(path))
    return get_dataset_meta(content)


@checked
def get_flops(config: arguments.Path) -> dict[str, int]:
    """Count the parameters of a model, and the FLOPs of its forward pass for one image of its config's size.

    The model is what ``get_model(config)`` gives: of a pretraining config the encoder alone. A multiply-add counts as
    one, as in OpenMMLab's tables. Nothing is computed and no memory taken, for the model is on the ``meta`` device.

    Args:
        config: a config file or a model of the zoo.

    Returns:
        Both numbers, by OpenMMLab's names ``Parameters`` and ``FLOPs``.

    Raises:
        InputError: there is no such model, or it cannot be built.
    """
    import torch
    from mmengine.utils import to_2tuple

    from mmmilan.engine.throughput import counted_flops

    backbone = read_config(config).model.backbone
    height, width = to_2tuple(backbone.get('img_size', 224))
    no_download = dict(backbone=dict(teacher=dict(pretrained=None))) if backbone.get('teacher') else {}
    with torch.device('meta'):
        model = get_model(config, **no_download).to('meta')  # to, for buffers that come from NumPy
        with torch.no_grad(), counted_flops() as counter:
            run_all(model, torch.empty(1, 3, height, width))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {'Parameters': parameters, 'FLOPs': counter.get_total_flops() // 2}


def run_all(model: BaseModel, images: Tensor) -> None:
    """Run all of a model; of a two-stage detector all heads, with as many proposals and masks as it may have."""
    if not hasattr(model, 'roi_head'):
        model(images, mode='tensor')
        return
    features, roi_head, limits = model.extract_feat(images), model.roi_head, model.test_cfg
    model.rpn_head(features)
    parts = [('bbox', limits.rpn.max_per_img)] + [('mask', limits.rcnn.max_per_img)] * roi_head.with_mask
    for part, count in parts:
        heads, extractors = (getattr(roi_head, f'{part}_{kind}') for kind in ('head', 'roi_extractor'))
        cascade = hasattr(heads, '__iter__')
        for head, extractor in zip(heads, extractors, strict=True) if cascade else [(heads, extractors)]:
            head(images.new_empty(count, features[0].shape[1], *extractor.roi_layers[0].output_size))
