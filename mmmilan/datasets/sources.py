"""A user's own images in folders, tar shards and single files, with the classes and splits that folder names give."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmmilan.datasets.image_folder import EXTENSIONS, ImageFolder
from mmmilan.datasets.shards import load_index
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS

Source = str | os.PathLike  # a folder of images and tar shards, however nested; a tar shard; or an image

HELD_OUT = ('val', 'test', 'minival')
SPLITS = ('train', 'unlabel', *HELD_OUT)


def is_image(path: Path) -> bool:
    """Whether the name of a file ends like an image's."""
    return path.suffix.lower() in EXTENSIONS


def as_sources(sources: Source | Sequence[Source]) -> list[Source]:
    """A single source as a list of one, and several as a list."""
    return [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)


def list_images(sources: Source | Sequence[Source]) -> list[str]:
    """All images of one or several sources, sorted by path within each source.

    Returns:
        Paths; an image in a shard has the path ``tar://...`` of :class:`mmmilan.datasets.shards.TarBackend`.

    Raises:
        InputError: a source does not exist, or holds no image.
    """
    return [image for source in as_sources(sources) for image in _images_in(source)]


def _images_in(source: Source) -> list[str]:
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f'{source} does not exist; give a folder of images, a tar file or an image.')
    files = [path] if path.is_file() else sorted(each for each in path.rglob('*') if each.is_file())
    images: list[str] = []
    for file in files:
        if is_image(file):
            images.append(str(file))
        elif file.suffix == '.tar':
            images += [image for image, _ in load_index(file)]
    if not images:
        raise InputError(f'{source} holds no image; it should hold files that end in {", ".join(EXTENSIONS)} or .tar.')
    return images


def class_folders(source: Source) -> list[str]:
    """The names of the folders of a source, if they name classes: two or more, no image beside them, and no splits."""
    folders = _folders_of_images(source)
    return [folder.name for folder in folders] if len(folders) > 1 and not splits_of(source) else []


def list_labelled_images(source: Source) -> tuple[list[str], np.ndarray, list[str]]:
    """Paths of the images of a source, their labels [M], int, and the class names of :func:`class_folders`.

    Without class folders all labels are 0 and there are no class names.

    Raises:
        InputError: the source does not exist, or holds no image.
    """
    images, classes = list_images(source), class_folders(source)
    if not classes:
        return images, np.zeros(len(images), int), classes
    images = [image for image in images if is_image(Path(image))]  # shards have no classes
    folders = [Path(image).relative_to(Path(source).expanduser()).parts[0] for image in images]
    return images, np.array([classes.index(folder) for folder in folders]), classes


def splits_of(source: Source) -> list[Path]:
    """The folders ``train``, ``val`` and the like of a data set with splits; [] for any other source."""
    folders = _folders_of_images(source)
    return folders if all(folder.name.startswith(SPLITS) for folder in folders) else []


def _folders_of_images(source: Source) -> list[Path]:
    """The folders directly in a source that hold images, however nested, sorted; [] if an image lies beside them."""
    path = Path(source).expanduser()
    if not path.is_dir() or any(is_image(each) for each in path.iterdir()):
        return []
    return sorted(each for each in path.iterdir() if each.is_dir() and any(map(is_image, each.rglob('*'))))


def training_sources(sources: Source | Sequence[Source]) -> list[Source]:
    """What to train on: the splits of each source except ``val`` and ``test``, or the source itself if it has none."""
    chosen: list[Source] = []
    for source in as_sources(sources):
        chosen += [split for split in splits_of(source) if not split.name.startswith(HELD_OUT)] or [source]
    return chosen


def evaluation_source(source: Source) -> Source:
    """What to evaluate on: the split ``val`` of a source, or else ``test``, or the source itself without splits."""
    splits = splits_of(source)
    held_out = [split for name in HELD_OUT for split in splits if split.name.startswith(name)]
    return (held_out or splits or [source])[0]


@DATASETS.register_module()
class ImageSources(ImageFolder):
    """The images of several sources, without labels.

    Args:
        sources: Folders (however nested), tar shards and images.
        kwargs: Other arguments of :class:`ImageFolder`, except ``data_root`` and ``with_label``.

    Raises:
        InputError: a source does not exist or holds no image.
    """

    def __init__(self, sources: Sequence[str], **kwargs) -> None:
        self.sources = sources
        super().__init__(data_root=str(sources[0]), **kwargs)

    def load_data_list(self) -> list[dict]:
        return [dict(img_path=path) for path in list_images(self.sources)]
