"""Draw what is annotated beside what is predicted while a model is tested: ``mmmilan test --show-dir``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmmilan.evaluation.predictions import annotated, predicted, predicted_task
from mmmilan.files import check_output_folder, short_name, write_part
from mmmilan.registry import HOOKS


@HOOKS.register_module()
class ShowHook(Hook):
    """Write a picture for each tested image, of classification, detection and segmentation alike.

    MMEngine's own hooks name pictures by the last part of a path, so that one replaces another; that of mmseg writes to
    the log's folder alone, and that of mmdet below it.

    Args:
        out_dir: The folder; a picture has the path that its image has in the folder of the data set.

    Raises:
        InputError: in use, if the model predicts no classes, or the folder is that of the images.
    """

    def __init__(self, out_dir: str) -> None:
        self.folder = Path(out_dir)

    def before_test(self, runner: Runner) -> None:
        from mmmilan.datasets.classes import class_names
        from mmmilan.visualization.pictures import colours_of

        model, dataset = runner.model, runner.test_dataloader.dataset
        while hasattr(model, 'module'):  # of several processes, or of several views of an image
            model = model.module
        self.task, self.root = predicted_task(model), folder_of(dataset)
        check_output_folder(self.folder, (), [self.root], pictures=True)
        self.classes = tuple(map(str, class_names(dataset)))
        self.colours = colours_of(getattr(dataset, 'metainfo', None), self.classes)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence) -> None:
        import cv2
        import numpy as np

        from mmmilan.datasets.decoding import LoadImage
        from mmmilan.visualization.pictures import draw_result, reduced

        for sample in outputs:
            image = reduced(LoadImage().read(sample.img_path))[..., ::-1].copy()
            results = annotated(sample, self.task), predicted(sample, self.task)
            drawn = [draw_result(image, self.task, each, self.classes, self.colours) for each in results]
            height = max(each.shape[0] for each in drawn)
            drawn = [np.pad(each, ((0, height - len(each)), (0, 4), (0, 0)), constant_values=255) for each in drawn]
            content = cv2.imencode('.jpg', np.concatenate(drawn, axis=1)[..., ::-1])[1].tobytes()
            write_part(self.folder / self.name(sample.img_path), content)

    def name(self, path: str) -> str:
        """The path of an image's picture: that in the data set, in another folder the whole."""
        path = plain_path(path)
        inner = os.path.relpath(path, self.root) if path.startswith(os.path.join(self.root, '')) else path.lstrip('/')
        return '/'.join(map(short_name, inner.removesuffix('.jpg').split('/'))) + '.jpg'


def plain_path(path: str) -> str:
    """The absolute path of an image, of one in a tar shard as if the shard were a folder."""
    return os.path.abspath(path.removeprefix('tar://'))


def folder_of(dataset: Dataset) -> str:
    """The root of a data set; without one, the deepest folder that holds all its images."""
    if root := getattr(dataset, 'data_root', None):
        return os.path.abspath(root)
    paths = (plain_path(dataset.get_data_info(index)['img_path']) for index in range(len(dataset)))
    return os.path.commonpath({os.path.dirname(path) for path in paths})
