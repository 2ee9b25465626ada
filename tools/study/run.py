"""One run of the study: train an arm, or the teacher, and measure its frozen encoder."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import numpy as np
import torch
from arms import STUDENT_IMAGES, TEACHER_IMAGES, TEMPLATES, TEST_IMAGES, read_arm
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import find_latest_checkpoint
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmmilan.datasets import ImageFolder
from mmmilan.engine.launch import launched
from mmmilan.engine.throughput import counted_flops
from mmmilan.evaluation.probes import Split, extract_features, knn_accuracy, linear_probe_accuracy
from mmmilan.evaluation.zero_shot import embed_classes, read_templates
from mmmilan.files import write_text
from mmmilan.models import CLIPTarget, LinearProjection, MaskCLIP, PromptingDecoder


def indices_of(images: slice, folder: Path) -> list[int]:
    """Indices of the chosen images of a folder."""
    return list(range(len(ImageFolder(str(folder)))))[images]


def configure(arm: str, seed: int, data: Path, work_dir: Path) -> Config:
    """The config of a run in the user's folders; it resumes if the run was stopped."""
    cfg = read_arm(arm)
    cfg.work_dir = str(
        work_dir / ('teacher' if arm == 'teacher' else f'{arm.replace(" ", "-").replace(",", "")}-{seed}')
    )
    cfg.randomness = dict(seed=seed)
    cfg.train_dataloader.dataset.data_root = str(data / 'train')
    cfg.test_dataloader.dataset.data_root = str(data / 'test')
    cfg.launcher = 'none'
    cfg.log_level = 'WARNING'
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    if arm == 'teacher':
        cfg.train_dataloader.dataset.captions = str(work_dir / 'captions.csv')
    else:
        cfg.train_dataloader.dataset.indices = indices_of(STUDENT_IMAGES, data / 'train')
        if cfg.model.head.get('teacher'):
            cfg.model.head.teacher.pretrained = find_latest_checkpoint(str(work_dir / 'teacher'))
    cfg.resume = find_latest_checkpoint(cfg.work_dir) is not None
    return cfg


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


class ProbedEncoder(nn.Module):
    """All features of an encoder that the study measures, from one pass, concatenated.

    Args:
        model: A MILAN, or the teacher, in evaluation mode.
        semantic: Also give the class token of the half of the patches that are most important to the teacher.

    Attributes:
        widths: Name -> width of each feature, in the order of concatenation.
    """

    def __init__(self, model: nn.Module, semantic: bool) -> None:
        super().__init__()
        self.model = model
        self.semantic = semantic
        self.data_preprocessor = model.data_preprocessor
        model.backbone.out_type = 'raw'
        width = model.backbone.embed_dims
        self.widths = dict(cls=width, mean=width)
        if semantic:
            self.widths['semantic'] = width
        if has_joint_space(model):
            self.widths['joint'] = model.encode_image(torch.zeros(1, 3, *model.backbone.img_size)).shape[1]

    def extract_feat(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] -> one tensor [B, sum of widths]."""
        tokens = self.model.backbone(images)[-1]
        columns = [tokens[:, 0], tokens[:, 1:].mean(1)]
        if self.semantic:
            _, importance = self.model.head.run_teacher(images)
            visible = importance.topk(importance.shape[1] // 2, dim=1).indices
            columns.append(self.model.backbone(images, visible)[:, 0])
        if 'joint' in self.widths:
            columns.append(self.model.project_joint(tokens)[:, 0])
        return [torch.cat(columns, dim=1)]


def has_joint_space(model: nn.Module) -> bool:
    """Whether unmasked images are projected to the joint space of image and text without the blocks of a decoder."""
    if isinstance(model, MaskCLIP):
        return True
    return isinstance(model.neck, (LinearProjection, PromptingDecoder)) and isinstance(model.head, CLIPTarget)


def measure(model: nn.Module, classes: Tensor, cfg: Config, data: Path, semantic: bool) -> dict[str, float]:
    """Top-1 accuracies in percent, by the names of ``MEASURES``.

    Args:
        model: A MILAN, or the teacher.
        classes: Text embeddings of the classes [K, C].
        cfg: The config of the run.
        data: Folder with ``train`` and ``test``.
        semantic: Also measure semantic-aware probing.
    """
    encoder = ProbedEncoder(model.eval(), semantic)
    train = extract_features(encoder, labelled_images(cfg, data / 'train', STUDENT_IMAGES), 'Features')
    test = extract_features(encoder, labelled_images(cfg, data / 'test', TEST_IMAGES), 'Features')
    ends = np.cumsum(list(encoder.widths.values()))[:-1]
    parts = [dict(zip(encoder.widths, np.split(features, ends, axis=1), strict=True)) for features, _ in (train, test)]

    def split(name: str, step: int = 1) -> tuple[Split, Split]:
        """Every ``step``-th training image of each class, and all test images."""
        chosen = np.concatenate([np.flatnonzero(train[1] == label)[::step] for label in np.unique(train[1])])
        return (parts[0][name][chosen], train[1][chosen]), (parts[1][name], test[1])

    measures = {}
    for token, suffix in (('cls', ''), ('mean', ', mean token')):
        measures[f'linear probe{suffix}'] = linear_probe_accuracy(*split(token))
        for share, step in ((10, 10), (1, 100)):
            measures[f'linear probe, {share} % of the labels{suffix}'] = linear_probe_accuracy(*split(token, step))
        measures[f'k-NN{suffix}'] = knn_accuracy(*split(token))
    if semantic:
        measures['linear probe, semantic-aware'] = linear_probe_accuracy(*split('semantic'))
    if 'joint' in encoder.widths:
        scores = parts[1]['joint'] @ classes.numpy().T
        measures['zero-shot'] = float((scores.argmax(1) == test[1]).mean())
    return {name: round(100 * value, 2) for name, value in measures.items()}


def run(arm: str, seed: int, data: Path, work_dir: Path) -> dict:
    """Train and measure; returns the line of the results file, without the id of the study."""
    torch.set_num_threads(1)
    if arm == 'teacher':
        write_captions(data, work_dir / 'captions.csv')
    cfg = configure(arm, seed, data, work_dir)
    with launched(cfg, 'train') as runner:
        start = time.process_time()
        runner.train()
        seconds = time.process_time() - start
        model, images = runner.model, len(runner.train_dataloader.dataset) * runner.max_epochs
        path = work_dir / 'teacher' / 'classes.pt'
        if arm == 'teacher':
            names = sorted(folder.name for folder in (data / 'train').iterdir() if folder.is_dir())
            torch.save(embed_classes(model.eval().text_tower(), names, read_templates(TEMPLATES)), path)
        result = dict(arm=arm, seed=seed, images=images, cpu_seconds=round(seconds, 1), resumed=cfg.resume)
        if arm != 'teacher':
            result['gflop_per_image'] = round(count_gflops(model.train(), cfg), 5)
        result['measures'] = measure(model, torch.load(path), cfg, data, semantic=arm == 'MILAN')
    return result


def count_gflops(model: nn.Module, cfg: Config) -> float:
    """GFLOP per image of a training step, forward and backward."""
    size = cfg.model.backbone.img_size
    with counted_flops() as counter:
        model.loss(torch.randn(4, 3, size, size))['loss'].backward()
    return counter.get_total_flops() / 4 / 1e9
