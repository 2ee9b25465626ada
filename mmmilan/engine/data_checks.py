"""Faults of a run's data: classes that differ by name, images that do not decode or fit, workers that die or hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from torch import Tensor
from torch.utils.data import DataLoader

from mmmilan.checkpoints.io import get_dataset_meta
from mmmilan.datasets.annotations import category_ids
from mmmilan.datasets.classes import class_names, positions, use_classes, wordnet_ids
from mmmilan.datasets.image_folder import is_replaced, num_corrupt
from mmmilan.errors import InputError, count, set_handlers, warn
from mmmilan.models.vit import MILANViT
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS
from mmmilan.workers import worker_fault

OF_WORKERS = ('persistent_workers', 'prefetch_factor')  # options that only data workers have
PATIENCE = 600.0  # seconds that a batch may take, where a data loader's config sets no ``timeout``


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Match the classes of data sets with a checkpoint's by name, and refuse other numbers of classes than the model's.

    COCO's metrics get the ids of the file's categories in the order of the classes.

    Args:
        classes: The model's, if the checkpoint names none; () warns of labels that are then taken as they are.

    Raises:
        InputError: data and model have different numbers of classes, or the data have a class that the checkpoint
            lacks.
    """

    priority = 'VERY_LOW'  # after the weights have been loaded

    def __init__(self, classes: Sequence[str] | None = None) -> None:
        self.classes = classes

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        source = str(runner._load_from or f'the last checkpoint in {runner.work_dir}')
        names = wordnet_ids(get_dataset_meta(checkpoint).get('classes') or self.classes or ())
        if not names and self.classes is not None:
            warn(f'{source} names no classes: the first label of the data is taken for its first class, and so on.')
        if not names or len(names) not in class_counts(runner).values():
            return
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            evaluator = getattr(loop, 'evaluator', None)
            if not isinstance(loop, BaseLoop) or has_own_classes(evaluator):
                continue
            own = class_names(loop.dataloader.dataset)
            if loop is runner._train_loop and not runner._resume and not own_names_fit(own, names):
                warn(f'{source} knows other classes than the training data: its head starts from theirs.')
                return
            use_classes(loop.dataloader.dataset, names, source)
            if evaluator:
                evaluator.dataset_meta = loop.dataloader.dataset.metainfo

    def before_train(self, runner: Runner) -> None:
        self.check_count(runner, runner.train_dataloader, 'training')
        if isinstance(runner.val_loop, BaseLoop):
            check_top(runner.val_loop, 'val')

    def before_val(self, runner: Runner) -> None:
        self.before_evaluation(runner, runner.val_loop, 'validation')

    def before_test(self, runner: Runner) -> None:
        self.before_evaluation(runner, runner.test_loop, 'test')

    def before_evaluation(self, runner: Runner, loop: BaseLoop, name: str) -> None:
        """Check the number of classes of a loop's data, and set the ids of its metrics."""
        if has_own_classes(loop.evaluator):
            return
        self.check_count(runner, loop.dataloader, name)
        check_top(loop, 'test' if name == 'test' else 'val')
        classes = getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes')
        for metric in loop.evaluator.metrics:
            if classes and getattr(metric, '_coco_api', None) is not None:
                metric.cat_ids = category_ids(metric._coco_api.cats, classes)

    def check_count(self, runner: Runner, loader: DataLoader, name: str) -> None:
        """Refuse data of another number of classes than the model's."""
        classes = getattr(loader.dataset, 'metainfo', {}).get('classes')
        wrong = [
            '.'.join(['model', *filter(None, [part]), f'num_classes={number}'])
            for part, number in class_counts(runner).items()
            if classes and number != len(classes)
        ]
        if wrong:
            found = count(len(classes), 'class')
            raise InputError(f'The {name} data has {found}, but {", ".join(wrong)}; make them equal.')


def check_top(loop: BaseLoop, name: str) -> None:
    """Raise an :class:`InputError` if a metric counts the best of more classes than the data have."""
    classes = getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes') or ()
    for metric in () if has_own_classes(loop.evaluator) else loop.evaluator.metrics:
        top = getattr(metric, 'topk', None) or ()
        top = [top] if isinstance(top, int) else top
        if classes and max(top, default=0) > len(classes):
            raise InputError(
                f'{name}_evaluator counts the best {max(top)} of {len(classes)} classes; set {name}_evaluator.topk to '
                f'{max([k for k in top if k <= len(classes)], default=1)}.'
            )


def class_counts(runner: Runner) -> dict[str, int]:
    """The number of classes of each part of the model that has one."""
    counts = {name: getattr(part, 'num_classes', None) for name, part in unwrap(runner.model).named_modules()}
    return {
        name: count
        for name, count in counts.items()
        if count is not None and not name.endswith('rpn_head')  # object or not
    }


def has_own_classes(evaluator: Evaluator | None) -> bool:
    """Whether a metric matches the classes itself, as ``ImageNetSubsetAccuracy`` does."""
    return any(getattr(metric, 'own_classes', False) for metric in getattr(evaluator, 'metrics', []))


def own_names_fit(own: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether two lists have the same names in any order."""
    return set(positions(own, 'the training data')) == set(positions(names, 'the checkpoint'))


@HOOKS.register_module()
class CorruptImageHook(Hook):
    """Leave images that took the place of one that did not decode out of scores, and warn how often there were some.

    They are counted over all processes, after each epoch and evaluation.
    """

    def before_val(self, runner: Runner) -> None:
        leave_out_replaced(runner.val_loop.evaluator)

    def before_test(self, runner: Runner) -> None:
        leave_out_replaced(runner.test_loop.evaluator)

    def after_train_epoch(self, runner: Runner) -> None:
        self.warn(runner, runner.train_dataloader, 'another took its place in training')

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.warn(runner, runner.val_dataloader, 'the scores of the evaluation are without it')

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.warn(runner, runner.test_dataloader, 'the scores of the test are without it')

    def warn(self, runner: Runner, loader: DataLoader, consequence: str) -> None:
        """Say how often an image did not decode."""
        corrupt = torch.tensor(num_corrupt(loader.dataset), device=get_device())
        all_reduce(corrupt)
        if corrupt:
            runner.logger.warning(f'{count(int(corrupt), "time")} so far an image did not decode, and {consequence}.')


class LeftOut:
    """What a metric has of an image that is left out, so that each process still has one result for each image."""


def leave_out_replaced(evaluator: Evaluator) -> None:
    """Let the metrics of an evaluator leave out images that stand in for others, see :func:`is_replaced`."""
    for metric in evaluator.metrics:
        if 'compute_metrics' not in vars(metric):
            metric.process = partial(_process_rest, metric, metric.process)
            metric.compute_metrics = partial(_compute_rest, metric.compute_metrics)


def _process_rest(metric: BaseMetric, process: Callable, data_batch: Any, data_samples: Sequence[dict]) -> None:
    replaced = list(map(is_replaced, data_samples))
    if not any(replaced):
        process(data_batch, data_samples)
        return
    begin = len(metric.results)
    process(data_batch, [sample for sample, left_out in zip(data_samples, replaced, strict=True) if not left_out])
    found = iter(metric.results[begin:])
    if len(metric.results) - begin == replaced.count(False):  # else not one for each image, nor in their order
        metric.results[begin:] = [LeftOut() if left_out else next(found) for left_out in replaced]


def _compute_rest(compute: Callable, results: list) -> dict[str, float]:
    return compute([result for result in results if not isinstance(result, LeftOut)])


@HOOKS.register_module()
class ImageSizeHook(Hook):
    """Warn once if the size of the images is not the encoder's ``img_size``.

    A ViT accepts them, but interpolates its positions and often gives worse results. Detectors and segmentors, which
    take images of any size, are not checked.
    """

    def __init__(self) -> None:
        self.seen = False

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train') -> None:
        if self.seen:
            return
        self.seen = True
        backbone = getattr(unwrap(runner.model), 'backbone', None)
        images = data_batch.get('inputs') if isinstance(data_batch, dict) else None
        image = images[0] if isinstance(images, (list, tuple, Tensor)) and len(images) else None
        if not isinstance(backbone, MILANViT) or not isinstance(image, Tensor) or image.ndim != 3:
            return
        if tuple(image.shape[1:]) != tuple(backbone.img_size):
            runner.logger.warning(
                f'The images are {tuple(image.shape[1:])} but img_size={tuple(backbone.img_size)}: positions are '
                'interpolated; make the sizes in the pipeline and model.backbone.img_size equal unless that is meant.'
            )


def guard_workers(runner: Runner) -> None:
    """Limit how long the data loaders of a runner wait for a batch, to ``PATIENCE``.

    Each worker gets a process group of its own: torchrun signals the whole group of a process, and a worker that ends
    at SIGTERM would end the run before its checkpoint is saved.
    """
    build = runner.build_dataloader

    def build_guarded(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        if isinstance(dataloader, dict) and not dataloader.get('num_workers'):
            # PyTorch refuses them without workers, and the recipes set them
            dataloader = {key: value for key, value in dataloader.items() if key not in OF_WORKERS}
        loader = build(dataloader, *args, **kwargs)
        loader.worker_init_fn = partial(init_worker, loader.worker_init_fn)
        if loader.num_workers and not loader.timeout:
            loader.timeout = PATIENCE
        return loader

    runner.build_dataloader = build_guarded


def init_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Move a new data worker into a process group of its own, then call the loader's own ``worker_init_fn``."""
    os.setpgid(0, 0)
    if then:
        then(worker)


@contextmanager
def worker_errors() -> Iterator[None]:
    """End the data workers at any error, and turn PyTorch's own about one that died or hangs into an ``InputError``.

    Python would wait at its exit for workers to which it sends SIGTERM, and one that starts or is suspended may lose
    it. Other processes that the program started before are not ended.
    """
    others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    try:
        yield
    except BaseException as error:
        set_handlers({signal.SIGCHLD: signal.SIG_DFL})  # PyTorch's handler would raise again for each worker
        workers = set(multiprocessing.active_children()) - set(others)
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(1)  # one may wait for a disk that hangs
        set_handlers({signal.SIGCHLD: handler})
        if not (message := worker_fault(error)):
            raise
        if 'timed out' in message:
            remedy = 'look at the disk and at the workers, or raise train_dataloader.timeout'
        else:
            remedy = 'if memory ran out, lower train_dataloader.num_workers'
        raise InputError(f'{message}; {remedy}, and continue with --resume.') from error
