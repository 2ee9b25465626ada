"""One's own images wherever they are: several folders, tar shards, single files; and what their folders say of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmmilan.datasets.captions import load_index
from mmmilan.datasets.image_folder import EXTENSIONS, ImageFolder
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS

PARTS = ('train', 'val', 'test', 'minival', 'unlabel')


def is_image(path: Path) -> bool:
    """Whether a file's name ends like an image's."""
    return path.suffix.lower() in EXTENSIONS


def list_images(source: str | os.PathLike) -> list[str]:
    """All images of a source, sorted by path.

    Args:
        source: a folder of images and tar shards, however nested; a tar shard; or an image.

    Returns:
        Paths; of an image in a shard, ``tar://...`` as :class:`mmmilan.datasets.captions.TarBackend` reads it.

    Raises:
        InputError: there is no such source, or no image in it.
    """
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


def class_folders(source: str | os.PathLike) -> list[str]:
    """Names of the folders that say what is on the images in them: two or more, and no image beside them.

    Folders such as ``train`` and ``val`` are parts of a data set and no classes.
    """
    path = Path(source).expanduser()
    if not path.is_dir() or any(is_image(each) for each in path.iterdir()):
        return []
    folders = [each for each in path.iterdir() if each.is_dir() and any(map(is_image, each.rglob('*')))]
    names = sorted(each.name for each in folders)
    return names if len(names) > 1 and not all(name.startswith(PARTS) for name in names) else []


@DATASETS.register_module()
class ImageSources(ImageFolder):
    """The images of several sources, without labels.

    Args:
        sources: Folders (however nested), tar shards and images, see :func:`list_images`.
        kwargs: Other arguments of :class:`ImageFolder`, but for ``data_root`` and ``with_label``.

    Raises:
        InputError: a source is missing or holds no image.
    """

    def __init__(self, sources: Sequence[str], **kwargs) -> None:
        self.sources = sources
        super().__init__(data_root=str(sources[0]), **kwargs)

    def load_data_list(self) -> list[dict]:
        return [dict(img_path=path) for source in self.sources for path in list_images(source)]
