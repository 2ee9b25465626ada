"""Models of the zoo, and of one's own checkpoints."""

from __future__ import annotations

import copy
import fnmatch
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmilan.checkpoints.zoo import find_model, resolve_checkpoint, zoo_models
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.config import Config
    from mmengine.model import BaseModel

    from mmmilan.models.embedding import Embedder


def list_models(pattern: str = '') -> list[str]:
    """Names of the models of the zoo that begin with a pattern, e.g. ``'milan*large'``."""
    return sorted(fnmatch.filter(zoo_models(), f'{pattern}*'))


def get_model(
    name: str | os.PathLike,
    pretrained: bool | str | os.PathLike = False,
    device: str | None = None,
    encoder_only: bool = True,
    **kwargs: Any,
) -> BaseModel:
    """A model in evaluation mode.

    Args:
        name: a model of the zoo, a config file, or a checkpoint of your own, whose config is in it or beside it.
        pretrained: True for the published weights, or a checkpoint in any layout: file, URL or name. A checkpoint that
            is given as ``name`` is loaded in any case.
        device: where to put the model.
        encoder_only: of a pretraining config, build the encoder alone, as an mmpretrain ``ImageClassifier`` without
            head; False builds decoder, target and teacher too.
        kwargs: what to change in the config's ``model``, e.g. ``backbone=dict(out_type='featmap')``.

    Returns:
        The model, which mmpretrain's inferencers take as well.

    Raises:
        InputError: the name is unknown, or the weights are not all there.
    """
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    own = is_checkpoint(name)
    config = _read_config(name, encoder_only)
    if pretrained is True and not own and str(name) not in zoo_models():
        raise InputError(f'{name} is a config without weights; give a checkpoint as `pretrained`.')
    source = name if isinstance(pretrained, bool) else pretrained
    weights = resolve_checkpoint(source) if pretrained or own else None  # before a model is built in vain
    config.merge_from_dict({'model': copy.deepcopy(kwargs)})  # MMEngine takes `_delete_` out of what it is given
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config.model)
        model._dataset_meta = _dataset_meta(config)
    model._config, model._metainfo = config, None
    if weights is not None:
        model._dataset_meta = _load_weights(model, weights) or model._dataset_meta
    model.eval()
    return model.to(device) if device else model


def is_checkpoint(name: str | os.PathLike) -> bool:
    """Whether this names a checkpoint file, and not a config or a model of the zoo."""
    return Path(name).suffix in ('.pth', '.pt', '.bin', '.safetensors') or (
        Path(name).is_file() and Path(name).suffix != '.py'
    )


def read_config(name: str | os.PathLike) -> Config:
    """The config of a model of the zoo, of a config file, or of a checkpoint of one's own.

    Raises:
        InputError: there is none.
    """
    from mmengine.config import Config

    from mmmilan.checkpoints.config import own_config

    if is_checkpoint(name):
        return own_config(name)
    path = Path(name) if Path(name).suffix == '.py' else find_model(str(name)).config
    if not path.is_file():
        raise InputError(f'{path} is not a file; give a config, a checkpoint or a model of the zoo.')
    return Config.fromfile(path)


def _read_config(name: str | os.PathLike, encoder_only: bool) -> Config:
    config = read_config(name)
    if 'masking' in config.model and encoder_only:
        normalisation = {key: config.model.data_preprocessor[key] for key in ('mean', 'std', 'to_rgb')}
        backbone = config.model.backbone
        config.model = dict(type='ImageClassifier', backbone=backbone, data_preprocessor=normalisation)
    return config


def build_embedder(model: BaseModel, checkpoint: str | os.PathLike) -> Embedder:
    """The encoder of a model, with its decoder where the checkpoint has one that predicts a CLIP's features.

    Args:
        model: what ``get_model(checkpoint)`` gives; its backbone is used, not copied.
        checkpoint: a model of the zoo or a checkpoint of one's own.

    Returns:
        The embedder in evaluation mode, on the model's device.
    """
    from mmengine.registry import DefaultScope

    from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
    from mmmilan.checkpoints.loading import as_mmmilan, load_weights
    from mmmilan.models.embedding import Embedder
    from mmmilan.registry import MODELS

    config, neck = read_config(checkpoint).model, None
    if config.get('head', {}) and config.head.type == 'mmmilan.CLIPTarget' and 'Decoder' in config.neck.type:
        path = resolve_checkpoint(checkpoint)
        content = load_checkpoint_file(path)
        if 'neck.decoder_pred.weight' in as_mmmilan(get_state_dict(content)):
            with DefaultScope.overwrite_default_scope('mmpretrain'):
                neck = MODELS.build(config.neck)
            load_weights(neck, content, str(path), 'neck')
    device = next(model.parameters()).device
    return Embedder(model.backbone, neck).to(device).eval()


def _dataset_meta(config: Config) -> dict:
    """Names of the classes that the config's dataset knows by itself."""
    from mmpretrain.registry import DATASETS

    return getattr(DATASETS.get(config.test_dataloader.dataset.type), 'METAINFO', {})


def _load_weights(model: BaseModel, path: Path) -> dict:
    """Load all weights of a model from a file; returns what the file says about its dataset."""
    from mmmilan.checkpoints.io import load_checkpoint_file
    from mmmilan.checkpoints.loading import load_weights

    content = load_checkpoint_file(path)
    load_weights(model, content, str(path))
    meta = content.get('meta') or {}
    return meta.get('dataset_meta') or ({'classes': meta['CLASSES']} if 'CLASSES' in meta else {})
