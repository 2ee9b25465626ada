"""Evaluate on a folder of labelled images in place of the test set of a config: ``mmmilan test --data``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from mmmilan.building import values_of
from mmmilan.checkpoints.task_config import config_task, dataset_meta, loads_annotations, test_dataset
from mmmilan.datasets.labelled import image_paths, read_labelled
from mmmilan.datasets.split_file import labelled_datasets, write_labelled
from mmmilan.engine.work_dir import is_main
from mmmilan.errors import InputError, count, listed


@contextmanager
def tested_on(
    config: Config,
    data: str | os.PathLike,
    classes: Sequence[str] | str | os.PathLike | None,
    ignore: Sequence[str] | str | None,
) -> Iterator[None]:
    """Let a config test on all labelled images of a folder; of one that is divided, on its ``val`` or else ``test``.

    Classes are matched by name with those of the checkpoint, or else of the config, when the weights are loaded.

    Args:
        config: Changed in place.
        data: See :func:`mmmilan.datasets.labelled.read_labelled`.
        classes: Names of its classes, if it does not name them.
        ignore: Classes of it that are left out.

    Raises:
        InputError: the model predicts no classes, or the folder has no labels for its task.
    """
    task = config_task(config)
    if task == 'classification' and ('masking' in config.model or not config.model.get('head')):
        raise InputError(f'{config.model.type} predicts no classes, so data cannot be given; leave out --data.')
    if not config.get('test_dataloader'):
        raise InputError(
            'The config has no test_dataloader, whose pipeline reads the images of data; give one that has.'
        )
    labelled = read_labelled(data, task, classes, ignore, evaluate=True)
    with tempfile.TemporaryDirectory() as folder:
        write_labelled(labelled, folder)
        names = dataset_meta(config).get('classes') or ()
        dataset = labelled_datasets(labelled, folder)['val']
        dataset['metainfo']['sources'] = [labelled.source]  # which messages name in place of a file that will be gone
        use_dataset(config, dataset, task)
        hook = dict(type='mmmilan.ClassCountHook', classes=list(map(str, names)))
        config.custom_hooks = [*(config.get('custom_hooks') or []), hook]
        if is_main(config):
            images, known = len(image_paths(labelled.val)), listed(labelled.classes)
            line = f'{count(images, "image")} to test on, {count(len(labelled.classes), "class")} ({known}).'
            for each in (f'{labelled.root}: {line}', *labelled.notes):
                print_log(each, logger='current')
        yield


def use_dataset(config: Config, dataset: dict[str, Any], task: str) -> None:
    """Test on a data set of our own, read by the pipeline of the config, in place."""
    pipeline = test_dataset(config)['pipeline']
    if task == 'segmentation':
        load = dict(type='mmmilan.LoadLabelMap', num_classes=len(dataset['metainfo']['classes']))
        pipeline = replace_loading(pipeline, load)
        if config.get('tta_pipeline'):
            config.tta_pipeline = replace_loading(config.tta_pipeline, load)
    config.test_dataloader.dataset = dataset | dict(pipeline=pipeline)
    for _, part in values_of(config.test_evaluator, 'test_evaluator'):
        if isinstance(part, dict) and 'ann_file' in part:
            part['ann_file'] = dataset['ann_file']


def replace_loading(steps: Any, load: Mapping[str, Any]) -> Any:
    """Steps of a pipeline, or of several views of an image, with ``load`` in place of what loads annotations."""
    if isinstance(steps, (list, tuple)):
        return [replace_loading(each, load) for each in steps]
    if 'transforms' in steps:
        return dict(steps, transforms=replace_loading(steps['transforms'], load))
    return dict(load) if loads_annotations(steps) else steps
