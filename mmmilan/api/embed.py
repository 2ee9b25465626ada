"""Features of many images in a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from torch import Tensor

    from mmmilan.api.inference import FeatureExtractor


def embed(
    images: Sequence[str | os.PathLike] | str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    patches: bool = False,
    batch_size: int = 32,
    num_workers: int | None = None,
    device: str | None = None,
) -> Path:
    """Write the features of images to a file.

    The file has, for each image in the order given, ``paths``; ``ok`` (whether it could be read); ``class_token`` and
    ``mean_token`` [D]; and, where the checkpoint has its decoder and the target was a CLIP, ``embedding`` [C], of
    length 1 in the joint space of image and text. All are float32; those of an image that does not decode are NaN.

    Args:
        images: images, folders of images (flat or nested, sorted by path) and tar shards.
        checkpoint: a model of the zoo, or a checkpoint of your own.
        out: file to write, .npz or .parquet (which needs pyarrow).
        patches: write ``patch_tokens`` [N, D], too, in float16: 0.3 MB an image for a ViT-B/16.
        batch_size: images that the model sees at once.
        num_workers: processes that read images, by default one a core and at most 8.
        device: where to run, by default on the GPU if there is one.

    Returns:
        The path of the file.

    Raises:
        InputError: an image is missing, none can be read, or the file cannot be written.

    Examples:
        >>> mmmilan.embed('photos', 'runs/photos/milan.pth', 'photos.npz')
        >>> numpy.load('photos.npz')['class_token'].shape
        (3068, 768)
    """
    import numpy as np
    from mmengine.logging import print_log

    from mmmilan.datasets.sources import list_images

    path = Path(out)
    check_ending(path)
    sources = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    files = [file for source in sources for file in list_images(source)]
    rows: dict[str, list[np.ndarray]] = {}
    for batch in features_of(files, checkpoint, batch_size, num_workers, device):
        if not patches:
            batch.pop('patch_tokens')
        for name, values in batch.items():
            rows.setdefault(name, []).append(values)
    columns = dict(paths=np.array(files)) | {name: np.concatenate(values) for name, values in rows.items()}
    broken = [file for file, ok in zip(files, columns['ok'], strict=True) if not ok]
    if len(broken) == len(files):
        raise InputError(f'None of the {len(files)} images can be read, e.g. {files[0]}; give images.')
    for file in broken:
        print_log(f'{file} cannot be read; its features are NaN.', logger='current', level=logging.WARNING)
    write_columns(columns, path)
    return path


def check_ending(path: Path) -> None:
    """Refuse a file that could not be written after all the work."""
    if path.suffix not in ('.npz', '.parquet'):
        raise InputError(f'{path} ends in neither .npz nor .parquet; choose one of them.')
    if path.suffix == '.parquet':
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise InputError(f'{path} needs pyarrow; pip install pyarrow, or write .npz.') from error


def features_of(
    files: list[str],
    checkpoint: str | os.PathLike,
    batch_size: int,
    num_workers: int | None,
    device: str | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Features of each batch by name, with ``ok``; a progress bar goes along."""
    import numpy as np
    import torch
    from rich.console import Console
    from rich.progress import track
    from torch.utils.data import DataLoader

    from mmmilan.api.inference import FeatureExtractor
    from mmmilan.api.models import build_embedder

    extract = FeatureExtractor(checkpoint, device=device)
    embedder, normalise = build_embedder(extract.model, checkpoint), extract.model.data_preprocessor
    num_workers = min(8, os.cpu_count(), len(files) // batch_size) if num_workers is None else num_workers
    loader = DataLoader(_Images(files, extract), batch_size, num_workers=num_workers)
    for inputs, ok in track(loader, 'Features', console=Console(stderr=True), disable=len(loader) < 2):
        with torch.no_grad():
            features = embedder(normalise(dict(inputs=inputs), False)['inputs'])
        batch = dict(ok=ok.numpy())
        for name, values in features.items():
            kind = np.float16 if name == 'patch_tokens' else np.float32
            batch[name] = values.cpu().numpy().astype(kind)
            batch[name][~batch['ok']] = np.nan
        yield batch


class _Images:
    """Data set of images, uint8 [3, H, W], and whether they could be read; they are black where not."""

    def __init__(self, files: list[str], extract: FeatureExtractor) -> None:
        self.files, self.extract = files, extract

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        import torch

        try:
            image = self.extract.load(dict(img_path=self.files[index]))
        except InputError:
            return torch.zeros(3, *self.extract.model.backbone.img_size, dtype=torch.uint8), False
        return self.extract.prepare(image)['inputs'], True


def write_columns(columns: dict[str, np.ndarray], path: Path) -> None:
    """Write arrays of as many rows each as ``.npz`` or Parquet (lists of numbers), whole or not at all."""
    import numpy as np

    from mmmilan.files import atomic_write

    with atomic_write(path) as temporary, open(temporary, 'wb') as file:
        if path.suffix == '.npz':
            np.savez(file, **columns)
            return
        import pyarrow as pa
        import pyarrow.parquet

        arrays = {
            name: pa.array(list(rows.reshape(len(rows), -1)) if rows.ndim > 1 else rows)
            for name, rows in columns.items()
        }
        pyarrow.parquet.write_table(pa.table(arrays), file)
