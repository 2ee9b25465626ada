"""A classifier's head begins as the linear probe of its frozen start (Kumar et al., arXiv 2202.10054)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from mmpretrain.registry import DATASETS, MODELS
from sklearn.model_selection import GridSearchCV
from torch import Tensor, nn

from mmmilan.building import dotted, in_scope
from mmmilan.checkpoints.io import checkpoints_in, load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.checkpoints.task_config import config_task
from mmmilan.errors import InputError
from mmmilan.evaluation.features import choose_device, extract, join
from mmmilan.evaluation.probes import Split, knn_accuracy, linear_probe

if TYPE_CHECKING:
    from mmengine.config import Config

TOKENS = dict(cls_token='class token', avg_featmap='mean token')  # by mmpretrain's out_type
PENALTY = 'logisticregression__C'  # scikit-learn's name for it
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of the probe's L2 penalty that are tried
FOLDS = 5
SEARCHED = 5000  # images at most that choose token and penalty
FILE = 'probe.pth'
SET = ('model.backbone.out_type', 'model.backbone.final_norm', 'model.head.init_cfg')  # by begin_as_probe


class Probe(NamedTuple):
    """A linear probe.

    Attributes:
        out_type: The token that it reads, a key of ``TOKENS``.
        weight: [C, D], of the features as they are.
        bias: [C].
        score: Its accuracy in cross-validation, in [0, 1].
    """

    out_type: str
    weight: np.ndarray
    bias: np.ndarray
    score: float

    def accuracy(self, test: Split) -> float:
        """Top-1 accuracy in [0, 1]."""
        return float(((test[0] @ self.weight.T + self.bias).argmax(1) == test[1]).mean())


def begin_as_probe(config: Config, folder: Path) -> dict[str, float]:
    """Let the head of a classifier begin as the linear probe of its frozen start, on the token that suits it better.

    Token and penalty are chosen by cross-validation on the training images. The probe is written to
    ``folder/probe.pth``, where the config, which is changed in place, reads it. A resumed run has its probe already.
    Other tasks, and random weights, begin with a random head.

    Args:
        config: Of :func:`mmmilan.api.finetune_recipe.new_config` or ``resumed_config``.
        folder: Of the run.

    Returns:
        Top-1 accuracies in [0, 1] on the validation images of what the frozen start gives for nothing, by name; {} if
        there is no probe.

    Raises:
        InputError: the folder has a ``probe.pth`` that is not a probe.
    """
    if not is_probed(config):
        return {}
    path = folder / FILE
    known = meta_of(path)
    if not checkpoints_in(folder):
        known = save_probe(config, path)
    if known:
        out_type = known['out_type']
        config.model.backbone.update(out_type=out_type, final_norm=out_type == 'cls_token')
        config.model.head.init_cfg = dict(type='Pretrained', checkpoint=str(path.absolute()), prefix='head.')
    return known.get('accuracies', {})


def save_probe(config: Config, path: Path) -> dict[str, Any]:
    """Fit a probe of the start and write it; returns what is said of it, ``accuracies`` and its token."""
    train, val = frozen_features(config)
    labels, classes = (train['label'], val['label']), config.model.head.num_classes
    probes = [fit_probe(out_type, (train[out_type], labels[0]), classes) for out_type in TOKENS]
    probe = max(probes, key=lambda each: each.score)
    accuracies = {f'linear probe on the {TOKENS[probe.out_type]}': probe.accuracy((val[probe.out_type], labels[1]))}
    for out_type, name in TOKENS.items():
        accuracies[f'k-NN by the {name}'] = knn_accuracy(*zip((train[out_type], val[out_type]), labels, strict=True))
    layer = {f'head.fc.{name}': torch.from_numpy(getattr(probe, name)).float() for name in ('weight', 'bias')}
    meta = dict(accuracies=accuracies, out_type=probe.out_type)
    save_checkpoint_file(dict(meta=meta, state_dict=layer), path)
    return meta


def is_probed(config: Config) -> bool:
    """Whether a run begins as a probe: of a classifier with a start."""
    return config_task(config) == 'classification' and bool(config.model.backbone.get('init_cfg'))


def refuse_what_it_sets(config: Config, changes: Mapping[str, Any]) -> None:
    """Raise an :class:`InputError` if a run begins as a probe and the user changes what that sets."""
    if is_probed(config):
        for option in dotted(changes):
            if option.startswith(SET):
                raise InputError(
                    f'A classifier with a start begins as the linear probe of it, which sets {option}; leave it out.'
                )


def meta_of(path: Path) -> dict[str, Any]:
    """What was said of a probe when it was written; {} if there is no file.

    Raises:
        InputError: the file is something else.
    """
    if not path.exists():
        return {}
    meta = load_checkpoint_file(path).get('meta') or {}
    if not {'accuracies', 'out_type'} <= meta.keys():
        raise InputError(f'{path} is not a probe of mmmilan, and would be replaced by one; choose another folder.')
    return meta


def frozen_features(config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the head would read with each ``out_type`` [M, D], and ``label`` [M], of training and validation images."""
    use_safe_loading()
    backbone = dict(copy.deepcopy(config.model.backbone), out_type='raw', final_norm=True, drop_path_rate=0.0)
    preprocessor = {key: value for key, value in config.model.data_preprocessor.items() if key != 'num_classes'}
    with in_scope():
        model = MODELS.build(dict(type='ImageClassifier', backbone=backbone, data_preprocessor=preprocessor))
        model.init_weights()
        model = model.to(choose_device(None)).eval()
        loaders = config.train_dataloader, config.val_dataloader
        pipeline = config.val_dataloader.dataset.pipeline
        splits = [DATASETS.build(dict(loader.dataset, pipeline=pipeline)) for loader in loaders]
    model.backbone.final_norm = False  # the mean is taken before the norm

    def encode(images: Tensor) -> dict[str, Tensor]:
        (tokens,) = model.backbone(images)
        norm = model.backbone.ln1
        mean = nn.functional.layer_norm(tokens[:, 1:].mean(1), norm.normalized_shape, eps=norm.eps)
        return dict(cls_token=norm(tokens[:, 0]), avg_featmap=mean)

    options = dict(num_workers=config.val_dataloader.num_workers, option='val_dataloader.num_workers')
    return tuple(
        join(extract(dataset, model.data_preprocessor, encode, 'Features of the frozen start', **options))
        for dataset in splits
    )


def fit_probe(out_type: str, train: Split, num_classes: int) -> Probe:
    """Logistic regression on standardised features, its penalty chosen by cross-validation.

    A class without images is as likely as one image in all, or less.
    """
    penalty = PENALTIES[1]
    folds, score = min(FOLDS, np.bincount(train[1]).max()), 0.0
    if folds > 1:
        part = np.random.default_rng(0).permutation(len(train[1]))[:SEARCHED]
        search = GridSearchCV(linear_probe(), {PENALTY: PENALTIES}, cv=folds, error_score=0.0, refit=False)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of classes with fewer images than folds, which some folds lack
            search.fit(*(rows[part] for rows in train))
        penalty, score = search.best_params_[PENALTY], search.best_score_
    scaler, classifier = linear_probe(penalty).fit(*train)
    coefficients, intercept = classifier.coef_, classifier.intercept_
    if len(coefficients) == 1:  # of two classes scikit-learn has the logit of the second
        coefficients, intercept = np.stack([-coefficients[0], coefficients[0]]) / 2, np.array([-1, 1]) * intercept / 2
    seen = coefficients / scaler.scale_
    weight = np.zeros((num_classes, seen.shape[1]))
    bias = np.full(num_classes, -np.log(len(train[1])))  # scikit-learn's logits sum to 0, so the highest is above it
    weight[classifier.classes_], bias[classifier.classes_] = seen, intercept - seen @ scaler.mean_
    return Probe(out_type, weight, bias, float(score))
