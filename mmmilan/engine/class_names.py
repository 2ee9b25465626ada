"""Data sets, model, metrics and checkpoint of a run agree on the classes."""

from __future__ import annotations

from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from torch.utils.data import DataLoader

from mmmilan.checkpoints.io import get_dataset_meta
from mmmilan.datasets.annotations import category_ids
from mmmilan.datasets.classes import class_names, positions, use_classes, warn, wordnet_ids
from mmmilan.errors import InputError
from mmmilan.models.wrapping import unwrap
from mmmilan.registry import HOOKS


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Match the classes of data sets with a checkpoint's by name, and refuse other numbers of classes than the model's.

    COCO's metrics get the ids of the file's categories in the order of the classes.

    Raises:
        InputError: data and model have different numbers of classes, or the data have a class that the checkpoint
            lacks.
    """

    priority = 'VERY_LOW'  # after the weights have been loaded

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        names = wordnet_ids(get_dataset_meta(checkpoint).get('classes') or ())
        if not names or len(names) not in class_counts(runner).values():
            return
        source = str(runner._load_from or f'the last checkpoint in {runner.work_dir}')
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

    def before_val(self, runner: Runner) -> None:
        self.before_evaluation(runner, runner.val_loop, 'validation')

    def before_test(self, runner: Runner) -> None:
        self.before_evaluation(runner, runner.test_loop, 'test')

    def before_evaluation(self, runner: Runner, loop: BaseLoop, name: str) -> None:
        """Check the number of classes of a loop's data, and set the ids of its metrics."""
        if has_own_classes(loop.evaluator):
            return
        self.check_count(runner, loop.dataloader, name)
        classes = getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes')
        for metric in loop.evaluator.metrics:
            if classes and getattr(metric, '_coco_api', None) is not None:
                metric.cat_ids = category_ids(metric._coco_api.cats, classes)

    def check_count(self, runner: Runner, loader: DataLoader, name: str) -> None:
        """Refuse data of another number of classes than the model's."""
        classes = getattr(loader.dataset, 'metainfo', {}).get('classes')
        wrong = [
            '.'.join(['model', *filter(None, [part]), f'num_classes={count}'])
            for part, count in class_counts(runner).items()
            if classes and count != len(classes)
        ]
        if wrong:
            raise InputError(f'The {name} data has {len(classes)} classes, but {", ".join(wrong)}; make them equal.')


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
