"""The page of a model that was trained on labels: what it gets right and wrong on its validation images."""

from __future__ import annotations

import heapq
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import nn
from torch.utils.data import Dataset

from mmmilan.arguments import typed
from mmmilan.building import in_scope
from mmmilan.checkpoints.config import call_of, own_config
from mmmilan.components import type_name
from mmmilan.datasets.classes import class_names
from mmmilan.datasets.decoding import LoadImage
from mmmilan.datasets.image_folder import is_replaced
from mmmilan.engine.launch import launched
from mmmilan.errors import count
from mmmilan.evaluation.comparison import Accuracy
from mmmilan.evaluation.features import device_name, evenly_spaced, progress
from mmmilan.evaluation.predictions import (
    SIZES,
    AveragePrecision,
    LabelCounts,
    Result,
    annotated,
    coco_results,
    object_score,
    predicted,
    predicted_task,
    wrong_objects,
)
from mmmilan.files import check_output
from mmmilan.visualization.page import Page, plain_text
from mmmilan.visualization.pictures import (
    DRAWN_FROM,
    colours_of,
    curve,
    draw_result,
    loss_curve,
    read_scalars,
    reduced,
)

PICTURES, WORST = 12, 12
MATRIX = 60  # classes of a confusion matrix, at most
CURVES = {
    'accuracy/top1': 'top-1 accuracy, %',
    'coco/bbox_mAP': 'box AP',
    'coco/segm_mAP': 'mask AP',
    'mIoU': 'mean IoU, %',
}
# Names of models, by type; of segmentors by that of their head.
KINDS = dict(UPerHead='UperNet', FCNHead='FCN', MaskRCNN='Mask R-CNN', FasterRCNN='Faster R-CNN')
METRICS = dict(classification='top-1 accuracy', detection='AP', segmentation='mean IoU')


class Validation:
    """What a model predicts for its validation images, and what is annotated.

    Args:
        model: A model of mmpretrain, mmdet or mmseg.
        dataset: The validation images.

    Attributes:
        scores: How good the prediction of each image is, from 0 to 1, by its path: whether a class is right, the AP of
            boxes, the IoU of maps; images without anything to find are left out.
    """

    def __init__(self, model: nn.Module, dataset: Dataset) -> None:
        self.task, self.has_masks = predicted_task(model), getattr(model, 'with_mask', False)
        self.dataset, self.classes = dataset, tuple(map(str, class_names(dataset)))
        self.colours = colours_of(getattr(dataset, 'metainfo', None), self.classes)
        self.shown = set(evenly_spaced(len(dataset), PICTURES))
        self.pictures: list[tuple[str, Result, Result]] = []
        self.worst: list[tuple[float, int, tuple[str, Result, Result]]] = []  # a heap, the least bad first
        self.labels: list[tuple[int, int, float]] = []  # annotated, predicted, and the score of the latter
        self.counts, self.images, self.objects = LabelCounts(len(self.classes)), [], []
        self.scores: dict[str, float] = {}

    def add(self, sample: Any) -> None:
        """Take an image with its prediction."""
        result, truth = predicted(sample, self.task), annotated(sample, self.task)
        number, entry = len(self.images), (sample.img_path, truth, result)
        self.images.append(getattr(sample, 'img_id', number))
        score, bad = self.judge(result, truth)
        if score is not None:
            self.scores[sample.img_path] = score
        if number in self.shown:
            self.pictures.append(entry)
        if bad > 0:
            heapq.heappush(self.worst, (bad, -number, entry))
            if len(self.worst) > WORST:
                heapq.heappop(self.worst)

    def judge(self, result: Result, truth: Result) -> tuple[float | None, float]:
        """How good a prediction is, see ``scores``, and how wrong, 0 if it is right; what the figures need is kept."""
        if self.task == 'segmentation':
            iou = self.counts.add(result, truth)
            return iou, 0.0 if iou is None else 1 - iou
        if self.task == 'classification':
            label, best = int(truth['labels'][0]), int(result['labels'][0])
            self.labels.append((label, best, float(result['scores'][0])))
            return float(label == best), float(result['scores'][0]) if label != best else 0.0
        self.objects.append(coco_results(result))
        return object_score(result, truth), wrong_objects(result, truth, DRAWN_FROM)

    def labels_drawn(self) -> list[int]:
        """The labels in the pictures of objects or label maps, sorted."""
        results = [result for _, *both in (*self.pictures, *self.worst_first()) for result in both]
        if self.task == 'segmentation':
            each = [np.unique(result['map']) for result in results]
        else:
            each = [r['labels'][r['scores'] >= DRAWN_FROM] if 'scores' in r else r['labels'] for r in results]
        return [label for label in np.unique(np.concatenate(each)).tolist() if label < len(self.classes)]

    def worst_first(self) -> list[tuple[str, Result, Result]]:
        return [entry for _, _, entry in sorted(self.worst, key=lambda item: item[:2], reverse=True)]


@torch.no_grad()
def validate(weights: str | os.PathLike) -> Validation:
    """Evaluate a model on the validation images of its config.

    Args:
        weights: A checkpoint with its config, of ``mmmilan.finetune`` or ``mmmilan.train``.

    Raises:
        InputError: the checkpoint has no config or no head, or its validation images are missing.
    """
    config = own_config(weights, with_data=True)
    config.test_dataloader = config.get('val_dataloader') or config.test_dataloader
    config.test_evaluator = config.get('val_evaluator') or config.test_evaluator
    config.load_from, config.resume, config.launcher = os.fspath(weights), False, 'none'
    config.work_dir = str(Path(weights).parent)
    with launched(config, 'test') as runner:
        found = Validation(runner.model, runner.test_dataloader.dataset)
        runner.load_or_resume()
        runner.model.eval()
        for batch in progress(runner.test_dataloader, 'Results on the validation images'):
            for sample in runner.model.test_step(batch):
                if not is_replaced(sample):
                    found.add(sample)
    return found


def write_results(
    found: Validation,
    weights: str | os.PathLike,
    page: str | os.PathLike,
    comparison: Mapping[str, Any] | None = None,
) -> Path:
    """Write a page of what a model gets right and wrong.

    Args:
        found: See :func:`validate`.
        weights: The model's checkpoint; the curves are those of the logs in its folder.
        page: The page to write, a single self-contained file, .html; it is replaced if it is there.
        comparison: Of ``mmmilan.finetune``, with the same model from another start: ``sentence`` is shown.

    Returns:
        The path of the page.

    Raises:
        InputError: the page cannot be written there.
    """
    path, config = check_output(page, [weights], endings=('.html',), overwrite=True), own_config(weights)
    html = Page(f'What the model learned: {found.task}', introduction(config, found))
    add_figures(html, found, comparison)
    add_training(html, Path(weights), config)
    add_pictures(html, found)
    made, written = call_of(config)['commands'], Path(weights).parent / 'config.py'
    if not made and written.is_file():
        made = [typed('train', [written], {}, {})]
    used = typed('predict', ['IMAGES', weights, 'predictions'], {}, {})
    for line in (*made, used, typed('test', [weights], dict(show_dir='pictures'), {})):
        html.paragraph(line, 'code')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    html.write(path, f'Made on {device_name(device)}, PyTorch {torch.__version__}.')
    return path


def introduction(config: Config, found: Validation) -> str:
    """What was trained on what."""
    backbone, start = config.model.backbone, (config.model.backbone.get('init_cfg') or {}).get('checkpoint')
    arch = backbone.get('arch')
    size = arch if isinstance(arch, str) else f'{arch.embed_dims} dimensions and {arch.num_layers} layers'
    trained, kind = trained_on(config), type_name(config.model)
    if kind == 'EncoderDecoder':  # which says nothing
        kind = type_name(config.model.decode_head)
    elif kind == 'MaskRCNN' and not found.has_masks:
        kind = 'FasterRCNN'
    kind = KINDS.get(kind, kind)
    return (
        f'{kind} on a ViT of {size}, from {Path(str(start)).name if start else "random weights"}. It was '
        f'trained on {count(trained, "image") if trained else "images"} and is evaluated here on '
        f'{count(len(found.images), "validation image")} of {count(len(found.classes), "class")}.'
    )


def trained_on(config: Config) -> int | None:
    """How many images were trained on; None if they are gone."""
    try:
        with in_scope(config):
            return len(DATASETS.build(config.train_dataloader.dataset))
    except Exception:  # of any type: the images may lie on another machine
        return None


def with_interval(value: float, interval: tuple[float, float]) -> str:
    return f'{value:.1f} % (95 % interval over the images {interval[0]:.1f} to {interval[1]:.1f})'


def add_figures(page: Page, found: Validation, comparison: Mapping[str, Any] | None) -> None:
    """Add the figures of the task: in all, and by class."""
    add = dict(classification=add_accuracy, detection=add_ap, segmentation=add_iou)[found.task]
    add(page, found, comparison)


def add_verdict(page: Page, sentence: str, comparison: Mapping[str, Any] | None) -> None:
    """Add the figure in one sentence, and the sentence of the comparison."""
    page.paragraph(sentence, 'verdict')
    if comparison:
        page.paragraph(str(comparison['sentence']), 'verdict')


def add_accuracy(page: Page, found: Validation, comparison: Mapping[str, Any] | None) -> None:
    """Add accuracy, that of each class, and the confusion matrix."""
    truth, best = (np.array(each) for each in list(zip(*found.labels, strict=True))[:2])
    accuracy = Accuracy(truth == best)
    matrix = np.zeros((len(found.classes),) * 2, int)
    np.add.at(matrix, (truth, best), 1)
    largest = 100 * matrix.sum(1).max() / len(truth)
    add_verdict(
        page,
        f'Top-1 accuracy {with_interval(accuracy.value, accuracy.interval)}; the largest class alone would give '
        f'{largest:.1f} %.',
        comparison,
    )
    page.heading('By class', 'Accuracy on the images of each class, and the class that they are most often taken for.')
    rows = []
    for label, name in enumerate(found.classes):
        images, others = int(matrix[label].sum()), matrix[label] * (np.arange(len(matrix)) != label)
        right = f'{100 * matrix[label, label] / images:.1f}' if images else 'no image'
        taken = f'{found.classes[others.argmax()]} ({others.max()})' if others.any() else ''
        rows.append([name, str(images), right, taken])
    page.table(['class', 'images', 'right, %', 'taken for'], rows)
    if 1 < len(found.classes) <= MATRIX:
        page.heading('Confusion matrix', 'Rows are the classes of the images, columns what they were taken for.')
        page.figure(draw_matrix(matrix, found.classes), 'The confusion matrix; its figures are in the table above.')


@plain_text
def draw_matrix(matrix: np.ndarray, classes: Sequence[str]) -> bytes:
    """Draw a confusion matrix as a PNG."""
    side = 2 + 0.32 * len(classes)
    figure = Figure(figsize=(side, side), layout='constrained')
    axes = figure.subplots()
    axes.imshow(matrix / matrix.sum(1, keepdims=True).clip(1), cmap='Blues', vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), [name[:24] for name in classes], rotation=90, fontsize=8)
    axes.set_yticks(range(len(classes)), [name[:24] for name in classes], fontsize=8)
    for row, column in zip(*np.nonzero(matrix), strict=True):
        light = matrix[row, column] > 0.5 * matrix[row].sum()
        axes.text(column, row, matrix[row, column], ha='center', va='center', fontsize=7, color='w' if light else 'k')
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    return buffer.getvalue()


def add_iou(page: Page, found: Validation, comparison: Mapping[str, Any] | None) -> None:
    """Add the mean IoU, that of each class, and the accuracy of pixels."""
    iou, annotated_pixels = found.counts.iou(), np.array(found.counts.annotated).sum(0)
    pixels = 100 * np.array(found.counts.common).sum() / max(annotated_pixels.sum(), 1)
    add_verdict(
        page,
        f'Mean IoU {with_interval(float(np.nanmean(iou)), found.counts.interval())}; {pixels:.1f} % of the pixels are '
        'right.',
        comparison,
    )
    nowhere = np.isnan(iou)
    explanation = 'IoU of each class over all images, and its share of the annotated pixels.'
    page.heading('By class', explanation + left_out(int(nowhere.sum())))
    share = 100 * annotated_pixels / max(annotated_pixels.sum(), 1)
    rows = [
        [name, f'{value:.1f}', f'{part:.1f}']
        for name, value, part, gone in zip(found.classes, iou, share, nowhere, strict=True)
        if not gone
    ]
    page.table(['class', 'IoU, %', 'pixels, %'], rows)


def add_ap(page: Page, found: Validation, comparison: Mapping[str, Any] | None) -> None:
    """Add the AP of boxes and masks: in all, by size, by class."""
    from mmmilan.datasets.annotations import category_ids
    from mmmilan.datasets.mmdet_coco import CheckedCOCO

    annotations = CheckedCOCO(found.dataset.ann_file)
    categories = category_ids(annotations.cats, found.classes)
    results = [
        each | dict(image_id=image, category_id=categories[each['category_id'] - 1])
        for image, objects in zip(found.images, found.objects, strict=True)
        for each in objects
    ]
    kinds = {'box': 'bbox'} | ({'mask': 'segm'} if found.has_masks else {})
    aps = {name: AveragePrecision(annotations, results, found.images, categories, kind) for name, kind in kinds.items()}
    sentences = [f'{name} AP {with_interval(ap.mean(), ap.interval())}' for name, ap in aps.items()]
    text = ', '.join(sentences)
    add_verdict(page, f'{text[0].upper()}{text[1:]}.', comparison)
    page.heading(
        'By size and overlap',
        'AP in percent: the mean over IoUs of 0.5 to 0.95, at 0.5 and at 0.75, and of objects below 32 x 32 pixels, '
        'below 96 x 96, and above.',
    )
    rows = []
    for name, ap in aps.items():
        values = [ap.mean(), ap.mean(iou=0), ap.mean(iou=5), *(ap.mean(size) for size in (1, 2, 3))]
        rows.append([name, *map(percent, values)])
    page.table(['', 'AP', 'AP50', 'AP75', *SIZES], rows)
    objects = [len(annotations.getAnnIds(imgIds=found.images, catIds=[each])) for each in categories]
    page.heading('By class', f'AP in percent, and the number of annotated objects.{left_out(objects.count(0))}')
    rows = [
        [name, str(objects[label]), *(percent(ap.value(label)) for ap in aps.values())]
        for label, name in enumerate(found.classes)
        if objects[label]
    ]
    page.table(['class', 'objects', *(f'{name} AP' for name in aps)], rows)


def left_out(number: int) -> str:
    """A sentence on the classes that a table leaves out."""
    return f' Left out: {count(number, "class")}, of which these images have nothing.' if number else ''


def percent(value: float) -> str:
    return 'none' if np.isnan(value) else f'{value:.1f}'


def add_training(page: Page, weights: Path, config: Config) -> None:
    """Add the curves of the training, from the logs in the folder of the checkpoint."""
    folder, rows = weights.parent, read_scalars(weights.parent)
    curves = {'training loss': loss_curve(folder)}
    curves |= {name: curve(rows, 'step', key) for key, name in CURVES.items()}
    curves = {name: points for name, points in curves.items() if len(points[0]) > 1}
    length = config.get('train_cfg') or {}
    amount = count(length.get('max_iters'), 'step')
    if planned := length.get('max_epochs'):
        done = max((row['epoch'] for row in rows if 'epoch' in row), default=planned)
        amount = count(planned, 'epoch') if done >= planned else f'{done} of {count(planned, "epoch")}'
    batch = config.train_dataloader.batch_size * config.optim_wrapper.get('accumulative_counts', 1)
    page.heading(
        'How it was trained',
        f'{amount} in batches of {batch}, learning rate '
        f'{config.optim_wrapper.optimizer.lr:g} ({config.optim_wrapper.optimizer.type}).'
        + (f' Over the training: {" and ".join(curves)}.' if curves else ''),
    )
    if curves:
        page.curves(curves)


def add_pictures(page: Page, found: Validation) -> None:
    """Add some images, annotated beside predicted, and those that are most wrong."""
    objects = f', objects from a score of {DRAWN_FROM}' if found.task == 'detection' else ''
    page.heading('Images', f'Annotated beside predicted{objects}.')
    if found.task != 'classification':
        labels = found.labels_drawn()
        page.legend(*([each[label] for label in labels] for each in (found.classes, found.colours)))
    add_rows(page, found, found.pictures)
    explanation = dict(
        classification='The wrong answers that the model was most certain of.',
        detection='The images with the most objects that are missed, or found where none is annotated.',
        segmentation='The images with the lowest mean IoU.',
    )[found.task]
    page.heading('The worst mistakes', f'{explanation} Wrong annotations show up here too.')
    if found.worst:
        add_rows(page, found, found.worst_first())
    else:
        page.paragraph('There are none.')


def add_rows(page: Page, found: Validation, entries: Sequence[tuple[str, Result, Result]]) -> None:
    """Add a gallery: the image, what is annotated, what is predicted."""
    rows, names = [], []
    for path, truth, result in entries:
        image = reduced(LoadImage().read(path))[..., ::-1].copy()
        drawn = [draw_result(image, found.task, each, found.classes, found.colours) for each in (truth, result)]
        rows.append(drawn if found.task == 'classification' else [image, *drawn])
        names.append(Path(path).name)
    header = ['annotated', 'predicted'] if found.task == 'classification' else ['image', 'annotated', 'predicted']
    notes = [[name, *[''] * (len(header) - 1)] for name in names]
    page.gallery(header, rows, names, notes)
