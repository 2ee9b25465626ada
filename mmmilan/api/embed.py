"""Write the features of many images to a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan import arguments
from mmmilan.api.feature_files import check_features_output, write_features
from mmmilan.arguments import checked

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from torch import Tensor

    from mmmilan.evaluation.features import Arrays


@checked
def embed(
    images: arguments.Paths,
    checkpoint: arguments.Path,
    out: arguments.Path,
    *,
    patches: bool = False,
    batch_size: arguments.Count = 32,
    num_workers: arguments.Workers | None = None,
    device: arguments.Device | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the features of images to a file.

    The columns of the file, with one row per image in the order given, are ``paths``; ``ok`` (whether the image could
    be read); ``class_token`` and ``mean_token`` [M, D]; and, if the checkpoint has a decoder that predicts CLIP
    features, ``embedding`` [M, C], of length 1 in the joint space of image and text. Features are float32; those of an
    image that cannot be used are NaN. A Parquet file is written batch by batch, an .npz file is held in memory.

    Args:
        images: images, folders of images (flat or nested, sorted by path) and tar shards.
        checkpoint: a model of the zoo, or a checkpoint of your own.
        out: file to write, .npz or .parquet (which needs pyarrow).
        patches: also write ``patch_tokens`` [M, N, D], float16: 0.3 MB per image for a ViT-B/16.
        batch_size: number of images that the model sees at once.
        num_workers: number of processes that read images, by default one per core and at most 8.
        device: where to run, by default on the GPU if there is one.
        overwrite: replace the file if there is one.

    Returns:
        The path of the file.

    Raises:
        InputError: an image is missing, none can be read, or the file must not or cannot be written.

    Examples:
        >>> mmmilan.embed('photos', 'runs/photos/milan.pth', 'photos.npz')
        >>> numpy.load('photos.npz')['class_token'].shape
        (3068, 768)
    """
    from mmengine.dist import is_main_process

    from mmmilan.api.inference import Inferencer
    from mmmilan.api.models import build_embedder
    from mmmilan.datasets.image_folder import as_sources, list_images

    path = check_features_output(out, [checkpoint, *as_sources(images)], overwrite)
    files = list_images(images)
    reader = Inferencer(checkpoint, device=device)
    embedder = build_embedder(reader.model, checkpoint)

    def encode(inputs: Tensor) -> dict[str, Tensor]:
        features = embedder(inputs)
        return {name: rows for name, rows in features.items() if patches or name != 'patch_tokens'}

    batches = reader.extract(files, encode, 'Features', batch_size=batch_size, num_workers=num_workers)
    columns = add_rows(files, batches)
    if is_main_process():
        write_features(path, columns)
    else:
        deque(columns, maxlen=0)
    return path


def add_rows(files: list[str], batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """The columns of each batch, with rows of NaN for the files that were left out."""
    import numpy as np

    begin = 0

    def columns(end: int, found: np.ndarray, batch: Arrays) -> Arrays:
        ok = np.isin(np.arange(begin, end), found)
        rows = dict(paths=np.array(files[begin:end]), ok=ok)
        for name, values in batch.items():
            dtype = np.float16 if name == 'patch_tokens' else np.float32
            rows[name] = np.full((len(ok), *values.shape[1:]), np.nan, dtype)
            rows[name][ok] = values
        return rows

    for batch in batches:
        found = batch.pop('position')
        yield columns(found[-1] + 1, found, batch)
        begin = found[-1] + 1
    if begin < len(files):
        yield columns(len(files), found[:0], {name: values[:0] for name, values in batch.items()})
