"""One run of the study: train an arm, or the teacher, and measure its encoder."""

from __future__ import annotations

import csv
import io
import json
import logging
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from arms import (
    BUDGETS,
    CONFIGS,
    CURVE_EPOCHS,
    CURVE_STEP,
    FINE_TUNING,
    FINE_TUNING_EPOCHS,
    LIGHTLY,
    NO_PRETRAINING,
    TEACHER_IMAGES,
    TEMPLATES,
    TEST_IMAGES,
    read_arm,
    schedule,
    set_schedule,
)
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmmilan.checkpoints.io import find_newest
from mmmilan.checkpoints.loading import load_weights
from mmmilan.datasets import ImageFolder
from mmmilan.engine.launch import launched
from mmmilan.engine.throughput import counted_flops
from mmmilan.evaluation.features import extract, join
from mmmilan.evaluation.probes import Split, knn_accuracy, linear_probe_accuracy
from mmmilan.evaluation.zero_shot import embed_classes, read_templates
from mmmilan.files import write_text

Features = tuple[dict[str, np.ndarray], np.ndarray]  # by name, and labels


def indices_of(images: slice, folder: Path) -> list[int]:
    """Indices of the chosen images of a folder."""
    return list(range(len(ImageFolder(str(folder)))))[images]


def run_folder(arm: str, seed: int, budget: str, work_dir: Path) -> Path:
    """The folder of a run; the teacher's is the same for all budgets."""
    if arm == 'teacher':
        return work_dir / 'teacher'
    name = arm.replace(' ', '-').replace(',', '')
    return work_dir / f'{name}-{seed}{"" if budget == "long" else f"-{budget}"}'


def newest_teacher(work_dir: Path) -> str:
    """The checkpoint of the teacher, which has been trained."""
    return str(find_newest(work_dir / 'teacher'))


def configure(arm: str, seed: int, budget: str, data: Path, work_dir: Path) -> Config:
    """The config of a run in the user's folders; it resumes if the run was stopped."""
    cfg = read_arm(arm)
    cfg.randomness = dict(seed=seed)
    cfg.train_dataloader.dataset.data_root = str(data / 'train')
    cfg.test_dataloader.dataset.data_root = str(data / 'test')
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)  # for the curve
    if arm == 'teacher':
        cfg.train_dataloader.dataset.captions = str(work_dir / 'captions.csv')
    else:
        cfg.train_dataloader.dataset.indices = indices_of(BUDGETS[budget].images, data / 'train')
        set_schedule(cfg, len(cfg.train_dataloader.dataset.indices), BUDGETS[budget])
        if cfg.model.head.get('teacher'):
            cfg.model.head.teacher.pretrained = newest_teacher(work_dir)
    return in_folder(cfg, run_folder(arm, seed, budget, work_dir))


def in_folder(cfg: Config, folder: Path) -> Config:
    """The config with what all trainings of the study share."""
    cfg.work_dir = str(folder)
    cfg.launcher = 'none'
    cfg.log_level = 'WARNING'
    return cfg


def launched_again(cfg: Config) -> AbstractContextManager[Runner]:
    """Start a training, or go on with it."""
    cfg.resume = find_newest(Path(cfg.work_dir)) is not None
    return launched(cfg, 'train')


def write_captions(data: Path, path: Path) -> None:
    """Write captions of the teacher's images: the templates in turn, filled with the class of the image."""
    folder = data / 'train'
    paths = [Path(info['img_path']).relative_to(folder) for info in ImageFolder(str(folder)).load_data_list()]
    rows = [['image', 'caption']]
    for i, image in enumerate(paths[TEACHER_IMAGES]):
        rows.append([str(image), TEMPLATES[i % len(TEMPLATES)].format(image.parts[0])])
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def labelled_images(cfg: Config, folder: Path, images: slice) -> Dataset:
    """The chosen images of a folder with labels, without augmentation."""
    dataset = dict(type='mmmilan.ImageFolder', data_root=str(folder), with_label=True)
    dataset |= dict(indices=indices_of(images, folder), pipeline=cfg.test_dataloader.dataset.pipeline)
    return DATASETS.build(dataset)


def features_of(
    model: nn.Module, images: Dataset, semantic: bool = False, joint: bool = False, indices: np.ndarray | None = None
) -> Features:
    """All features of an encoder that the study measures, from one pass.

    Args:
        model: A MILAN, or the teacher, in evaluation mode.
        images: With labels.
        semantic: Also give the class token of the half of the patches that are most important to the teacher.
        joint: Also give the class token in the joint space of image and text.
        indices: Of the images to take, by default all.

    Returns:
        Features [M, D] by name, and labels [M].
    """
    model.backbone.out_type = 'raw'

    def encode(inputs: Tensor) -> dict[str, Tensor]:
        tokens = model.backbone(inputs)[-1]
        columns = dict(cls=tokens[:, 0], mean=tokens[:, 1:].mean(1))
        if semantic:
            _, importance = model.head.run_teacher(inputs)
            visible = importance.topk(importance.shape[1] // 2, dim=1).indices
            columns['semantic'] = model.backbone(inputs, visible)[:, 0]
        if joint:
            columns['joint'] = model.project_joint(tokens)[:, 0]
        return columns

    options = dict(indices=indices, batch_size=128, num_workers=0)
    found = join(extract(images, model.data_preprocessor, encode, 'Features', **options))
    return found, found['label']


def split(train: Features, test: Features, name: str, step: int = 1) -> tuple[Split, Split]:
    """Every ``step``-th training image of each class, and all test images."""
    chosen = np.concatenate([np.flatnonzero(train[1] == label)[::step] for label in np.unique(train[1])])
    return (train[0][name][chosen], train[1][chosen]), (test[0][name], test[1])


def percent(accuracies: dict[str, float]) -> dict[str, float]:
    return {name: round(100 * value, 2) for name, value in accuracies.items()}


def probe(train: Features, test: Features, classes: Tensor) -> dict[str, float]:
    """Top-1 accuracies in percent of frozen features, by the names of ``MEASURES``.

    Args:
        train: What :func:`features_of` gives of the student's images.
        test: The same of the test images.
        classes: Text embeddings of the classes [K, C].
    """
    measures = {}
    for token, suffix in (('cls', ''), ('mean', ', mean token')):
        measures[f'linear probe{suffix}'] = linear_probe_accuracy(*split(train, test, token))
        for share, step in ((10, 10), (1, 100)):
            probes = split(train, test, token, step)
            measures[f'linear probe, {share} % of the labels{suffix}'] = linear_probe_accuracy(*probes)
        measures[f'k-NN{suffix}'] = knn_accuracy(*split(train, test, token))
    if 'semantic' in test[0]:
        measures['linear probe, semantic-aware'] = linear_probe_accuracy(*split(train, test, 'semantic'))
    if 'joint' in test[0]:
        scores = test[0]['joint'] @ classes.numpy().T
        measures['zero-shot'] = float((scores.argmax(1) == test[1]).mean())
    return percent(measures)


def curve_point(train: Features, test: Features, step: int = CURVE_STEP) -> dict[str, float]:
    """The measures of a point of the curve, by every ``step``-th of the student's images."""
    accuracies = {}
    for token, suffix in (('cls', ''), ('mean', ', mean token')):
        rows = split(train, test, token, step)
        accuracies |= {f'linear probe{suffix}': linear_probe_accuracy(*rows), f'k-NN{suffix}': knn_accuracy(*rows)}
    return percent(accuracies)


def every(step: int, labelled: Dataset) -> np.ndarray:
    """Places of every ``step``-th image of each class."""
    labels = labelled.get_gt_labels()
    return np.concatenate([np.flatnonzero(labels == label)[::step] for label in np.unique(labels)])


def remembered(path: Path, function: Callable[[], dict]) -> dict:
    """What the function gives; a run that was stopped later reads it from the file."""
    if not path.exists():
        write_text(path, json.dumps(function()) + '\n')
    return json.loads(path.read_text(encoding='utf-8'))


def fine_tune(checkpoint: Path | None, share: int, seed: int, images: slice, data: Path, folder: Path) -> dict:
    """``accuracy`` in percent on the test images after fine-tuning with a share, in percent, of the images.

    Args:
        checkpoint: Where the encoder starts; None: random weights.
    """
    cfg = in_folder(Config.fromfile(CONFIGS / FINE_TUNING), folder)
    cfg.randomness = dict(seed=seed)
    backbone = cfg.model.backbone
    backbone.init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint)) if checkpoint else None
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    cfg.train_dataloader.dataset.data_root = str(data / 'train')
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.test_dataloader.dataset.update(data_root=str(data / 'test'), indices=indices_of(TEST_IMAGES, data / 'test'))
    labelled = ImageFolder(str(data / 'train'), with_label=True, indices=indices_of(images, data / 'train'))
    chosen = every(100 // share, labelled)
    cfg.model.data_preprocessor.num_classes = cfg.model.head.num_classes = len(labelled.CLASSES)
    cfg.train_dataloader.dataset.indices = [int(i) for i in np.array(indices_of(images, data / 'train'))[chosen]]
    cfg.train_dataloader.batch_size = min(cfg.train_dataloader.batch_size, len(chosen))
    cfg.train_cfg.max_epochs = FINE_TUNING_EPOCHS[share]
    cfg.param_scheduler = schedule(FINE_TUNING_EPOCHS[share] * (len(chosen) // cfg.train_dataloader.batch_size))
    with launched_again(cfg) as runner:
        runner.train()
        return dict(accuracy=round(runner.test()['accuracy/top1'], 2))


def train_lightly(cfg: Config, seed: int, python: str) -> dict:
    """Train LightlyTrain's arm by a Python that has it, if it is not trained yet; gives what the line says of it."""
    folder = Path(cfg.work_dir)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    images = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    model = cfg.model.to_dict()
    job = dict(backbone=model['backbone'], teacher=model['head']['teacher'], folder=str(folder), seed=seed)
    job['pretrain'] = dict(cfg.pretrain.to_dict(), data=images, epochs=cfg.train_cfg.max_epochs)
    write_text(folder / 'job.json', json.dumps(job))
    if not (folder / 'training.json').exists():
        subprocess.run([python, str(Path(__file__).with_name('distill_lightly.py')), folder / 'job.json'], check=True)
    return json.loads((folder / 'training.json').read_text(encoding='utf-8'))


def train(arm: str, seed: int, cfg: Config, python: str) -> tuple[nn.Module, dict]:
    """Train; gives the model, and what the line says of the training."""
    if arm in (LIGHTLY, NO_PRETRAINING):
        init_default_scope('mmpretrain')
        MMLogger.get_current_instance().setLevel(logging.ERROR)
        torch.manual_seed(seed)
        model = MODELS.build(cfg.model)
        model.init_weights()
        if arm == NO_PRETRAINING:
            return model, dict(images=0, epochs=0, cpu_seconds=0, resumed=False)
        return model, train_lightly(cfg, seed, python)
    with launched_again(cfg) as runner:
        start = time.process_time()
        runner.train()
        seconds = round(time.process_time() - start, 1)
        images, epochs = len(runner.train_dataloader.dataset), runner.max_epochs
    result = dict(images=images * epochs, epochs=epochs, cpu_seconds=seconds, resumed=cfg.resume)
    if arm != 'teacher':
        result['gflop_per_image'] = round(count_gflops(runner.model.train(), cfg), 5)
    return runner.model, result


def run(arm: str, seed: int, budget: str, data: Path, work_dir: Path, python: str) -> dict:
    """Train and measure; returns the line of the results file, without the id of the study."""
    torch.set_num_threads(1)
    if arm == 'teacher':
        write_captions(data, work_dir / 'captions.csv')
    cfg = configure(arm, seed, budget, data, work_dir)
    folder, images = Path(cfg.work_dir), BUDGETS[budget].images
    result = dict(arm=arm, seed=seed, budget=budget)
    model, training = train(arm, seed, cfg, python)
    result |= remembered(folder / 'training.json', lambda: training)  # if it was trained before, this took no time
    last = folder / f'epoch_{result["epochs"]}.pth' if result['epochs'] else None
    if arm == LIGHTLY:
        load_encoder(model, last)
    classes = work_dir / 'teacher' / 'classes.pt'
    if arm == 'teacher':
        names = sorted(path.name for path in (data / 'train').iterdir() if path.is_dir())
        torch.save(embed_classes(model.eval().text_tower(), names, read_templates(TEMPLATES)), classes)
    train_images = labelled_images(cfg, data / 'train', images)
    test_images = labelled_images(cfg, data / 'test', TEST_IMAGES)

    def measure_frozen() -> dict:
        """The probes of the trained encoder, and the curve."""
        options = dict(semantic=arm == 'MILAN', joint=model.has_joint_space and arm != LIGHTLY)
        features = tuple(features_of(model.eval(), images, **options) for images in (train_images, test_images))
        points = [dict(epoch=result['epochs']) | curve_point(*features)]
        for epoch in reversed([epoch for epoch in CURVE_EPOCHS if epoch < result['epochs'] and arm != 'teacher']):
            load_encoder(model, folder / f'epoch_{epoch}.pth')
            some = every(CURVE_STEP, train_images)
            parts = features_of(model.eval(), train_images, indices=some), features_of(model, test_images)
            points.insert(0, dict(epoch=epoch) | curve_point(*parts, step=1))
        return dict(measures=probe(*features, torch.load(classes)), curve=points)

    result |= remembered(folder / f'frozen-{budget}.json', measure_frozen)
    if arm != 'teacher':
        for share, name in ((10, 'fine-tuning, 10 % of the labels'), (100, 'fine-tuning')):
            tune = partial(fine_tune, last, share, seed, images, data, folder / f'finetune-{share}')
            result['measures'] |= {name: remembered(folder / f'finetune-{share}.json', tune)['accuracy']}
    return result


def load_encoder(model: nn.Module, path: Path) -> None:
    """Load the encoder of a checkpoint of the study."""
    load_weights(model.backbone, torch.load(path, map_location='cpu', weights_only=False), str(path), 'backbone')


def count_gflops(model: nn.Module, cfg: Config) -> float:
    """GFLOP per image of a training step, forward and backward, mean over the training."""
    images = torch.randn(4, 3, cfg.model.backbone.img_size, cfg.model.backbone.img_size)
    with counted_flops() as counter:
        model.loss(images)['loss'].backward()
    with counted_flops() as teacher:
        model.head.run_teacher(images)
    is_kept, epochs = 'teacher_cache' in cfg.default_hooks, cfg.train_cfg.max_epochs
    recalled = max(0, 1 - cfg.train_dataloader.sampler.crops / epochs) if is_kept else 0  # share of the steps
    return (counter.get_total_flops() - recalled * teacher.get_total_flops()) / 4 / 1e9
