"""Evaluate on a folder of labelled images in place of the test set of a config: ``mmmilan test --data``."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mmengine.config import Config
from mmengine.logging import print_log

from mmmilan.datasets.classes import listed
from mmmilan.datasets.labelled import labelled_datasets, read_labelled, write_labelled
from mmmilan.engine.work_dir import is_main
from mmmilan.errors import InputError, count

LOADS_ANNOTATIONS = re.compile(r'Load\w*(Annotation|LabelMap)')


def config_task(config: Config) -> str:
    """The task of a config with a head: classification, detection or segmentation."""
    scopes = dict(mmdet='detection', mmseg='segmentation')
    return scopes.get(config.get('default_scope'), 'classification')


@contextmanager
def tested_on(
    config: Config,
    data: str | os.PathLike,
    classes: Sequence[str] | str | os.PathLike | None,
    ignore: Sequence[str] | str | None,
) -> Iterator[None]:
    """Let a config test on all labelled images of a folder; of one that is divided, on its ``val`` or else ``test``.

    Classes are matched with those of the model by name when its weights are loaded.

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
    labelled = read_labelled(data, task, classes, ignore, divide=False)
    with tempfile.TemporaryDirectory() as folder:
        write_labelled(labelled, folder)
        own = labelled_datasets(labelled, folder)['val']
        pipeline = config.test_dataloader.dataset.pipeline
        if task == 'segmentation':
            load = dict(type='mmmilan.LoadLabelMap', num_classes=len(labelled.classes))
            pipeline = [load if LOADS_ANNOTATIONS.search(str(step.type)) else step for step in pipeline]
        config.test_dataloader.dataset = own | dict(pipeline=pipeline)
        if 'ann_file' in config.test_evaluator:
            config.test_evaluator.ann_file = own['ann_file']
        if is_main(config):
            images = len(labelled.val['images'] if task == 'detection' else labelled.val)
            names = f'{count(len(labelled.classes), "class")} ({listed(labelled.classes)})'
            for line in (f'{labelled.root}: {count(images, "image")} to test on, {names}.', *labelled.notes):
                print_log(line, logger='current')
        yield
