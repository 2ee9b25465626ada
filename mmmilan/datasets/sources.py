"""One's own images wherever they are: several folders, tar shards, single files; and what their folders say of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmmilan.datasets.captions import load_index
from mmmilan.datasets.image_folder import EXTENSIONS, ImageFolder
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS

HELD_OUT = ('val', 'test', 'minival')
PARTS = ('train', 'unlabel', *HELD_OUT)


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
    folders = folders_of_images(source)
    return [folder.name for folder in folders] if len(folders) > 1 and not parts_of(source) else []


def folders_of_images(source: str | os.PathLike) -> list[Path]:
    """The folders in a folder that hold images, however nested, sorted; none where an image lies beside them."""
    path = Path(source).expanduser()
    if not path.is_dir() or any(is_image(each) for each in path.iterdir()):
        return []
    return sorted(each for each in path.iterdir() if each.is_dir() and any(map(is_image, each.rglob('*'))))


def parts_of(source: str | os.PathLike) -> list[Path]:
    """The folders ``train``, ``val`` and the like of a data set that is divided into them; none of any other source."""
    folders = folders_of_images(source)
    return folders if all(folder.name.startswith(PARTS) for folder in folders) else []


def training_images(source: str | os.PathLike) -> list[str | os.PathLike]:
    """What of a source to train on: of a data set that is divided into parts, all but ``val`` and ``test``."""
    return [part for part in parts_of(source) if not part.name.startswith(HELD_OUT)] or [source]


def evaluation_images(source: str | os.PathLike) -> str | os.PathLike:
    """What of a source to evaluate on: of a data set that is divided into parts, ``val``, or else ``test``."""
    parts = parts_of(source)
    held_out = [part for name in HELD_OUT for part in parts if part.name.startswith(name)]
    return (held_out or parts or [source])[0]


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
