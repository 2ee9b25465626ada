"""The last part of the demo, ``--full``: transfer to classification, detection and segmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch.utils.data import Dataset

from mmmilan.evaluation.features import evenly_spaced
from mmmilan.visualization.pictures import class_colours, draw_labels, draw_objects

NUM_PICTURES = 6
MIN_SCORE = 0.5  # boxes of lower scores are not drawn


@dataclass(frozen=True)
class Task:
    """A task of the demo.

    Attributes:
        name: Name of the task.
        config: File name of its config.
        metrics: Name of each metric, in percent -> key in MMEngine's results.
    """

    name: str
    config: str
    metrics: dict[str, str]


TASKS = (
    Task('classification', 'vit-tiny-p8_finetune_scenes.py', {'top-1': 'accuracy/top1'}),
    Task('detection', 'mask-rcnn_vit-tiny-p8_scenes.py', {'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'}),
    Task('segmentation', 'upernet_vit-tiny-p8_scenes.py', {'mIoU': 'mIoU'}),
)


@dataclass
class Transfer:
    """Results of fine-tuning.

    Attributes:
        scores: 'task, metric' -> name of the encoder -> score in percent.
        runners: Task -> name of the encoder -> runner with the fine-tuned model.
    """

    scores: dict[str, dict[str, float]]
    runners: dict[str, dict[str, Runner]]


def fill_in(cfg: Config, scenes: Path, start: Path) -> Config:
    """Set the data set of a task's config and the checkpoint that the encoder starts from."""
    cfg.model.backbone.init_cfg.checkpoint = str(start)
    train, num_images = cfg.train_dataloader, len(list((scenes / 'train').glob('*/*.jpg')))
    train.dataset.indices = [i for i in train.dataset.indices if i < num_images]
    train.batch_size = min(train.batch_size, len(train.dataset.indices))
    for loader in (train, cfg.test_dataloader):
        loader.dataset.data_root = str(scenes)
    if 'ann_file' in cfg.test_evaluator:
        cfg.test_evaluator.ann_file = str(scenes / 'annotations' / 'instances_val.json')
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None  # one evaluation, after training
    return cfg


def transfer(
    starts: dict[str, Path],
    scenes: Path,
    read_config: Callable[[str, str], Config],
    train: Callable[[Config, str], tuple[Runner, float]],
) -> Transfer:
    """Fine-tune each of ``TASKS`` from each checkpoint, with the same schedule, and evaluate it.

    Args:
        starts: Name of the encoder -> its checkpoint.
        scenes: Folder of the data set.
        read_config: Function from file name and stage to config.
        train: Function from config and description to runner and seconds.
    """
    result = Transfer({}, {})
    for task in TASKS:
        result.runners[task.name] = {}
        for name, start in starts.items():
            cfg = fill_in(read_config(task.config, f'{task.name}-{name.lower()}'), scenes, start)
            runner, _ = train(cfg, f'{task.name}, {name}')
            metrics = runner.test()
            for label, key in task.metrics.items():
                # MMDetection reports no AP if nothing was detected
                score = float(metrics.get(key, 0)) * (100 if key.startswith('coco') else 1)
                result.scores.setdefault(f'{task.name}, {label}', {})[name] = score
            result.runners[task.name][name] = runner
    return result


def transfer_pictures(result: Transfer) -> tuple[list[str], list[list[np.ndarray]]]:
    """Header and rows of the page's gallery: images, annotated and predicted objects, annotated and predicted maps."""
    dataset = test_set(result.runners['detection'])
    paths = [dataset[i]['data_samples'].img_path for i in evenly_spaced(len(dataset), NUM_PICTURES)]
    images = [mmcv.imread(path, channel_order='rgb') for path in paths]
    header, columns = ['image'], [images]
    for title, task, draw in (('objects', 'detection', draw_instances), ('classes', 'segmentation', draw_map)):
        runners = result.runners[task]
        dataset = test_set(runners)
        index = {dataset.get_data_info(i)['img_path']: i for i in range(len(dataset))}
        samples = [dataset[index[path]] for path in paths]
        classes = dataset.metainfo['classes']
        header += [f'{title}: annotated', *(f'{title}: {name}' for name in runners)]
        pairs = list(zip(images, samples, strict=True))
        columns.append([draw(image, sample['data_samples'], 'gt', classes) for image, sample in pairs])
        for runner in runners.values():
            columns.append([draw(image, predict(runner, sample), 'pred', classes) for image, sample in pairs])
    return header, [list(row) for row in zip(*columns, strict=True)]


def test_set(runners: dict[str, Runner]) -> Dataset:
    """The test set of a task, which is the same for all its encoders."""
    return next(iter(runners.values())).test_dataloader.dataset


@torch.no_grad()
def predict(runner: Runner, sample: dict) -> BaseDataElement:
    """The data sample of an image with predictions, in pixels of the original image."""
    runner.model.eval()
    return runner.model.test_step(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]))[0].cpu()


def draw_instances(image: np.ndarray, sample: BaseDataElement, kind: str, classes: Sequence[str]) -> np.ndarray:
    """Draw the annotated (kind 'gt') or predicted ('pred') objects of MMDetection's data sample on the image."""
    objects = sample.get(f'{kind}_instances')
    if kind == 'gt':
        boxes, masks = objects.bboxes.tensor, torch.from_numpy(objects.masks.masks).bool()
    else:
        objects = objects[objects.scores > MIN_SCORE]
        boxes, masks = objects.bboxes, objects.masks
    return draw_objects(image, boxes, masks, objects.labels, classes)


def draw_map(image: np.ndarray, sample: BaseDataElement, kind: str, classes: Sequence[str]) -> np.ndarray:
    """Draw the annotated (kind 'gt') or predicted ('pred') label map of MMSegmentation's data sample on the image."""
    return draw_labels(image, sample.get(f'{kind}_sem_seg').data[0].numpy(), class_colours(len(classes)))
