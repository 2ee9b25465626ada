"""Write the features of many images to a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan import arguments
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
    be read); ``model``, 16 digits that tell the encoder from others; ``class_token`` and ``mean_token`` [M, D]; and, if
    the checkpoint compares images with texts (MILAN with its decoder, MaskCLIP), ``embedding`` [M, C], of length 1 in
    their space. Features are float32; those of an image that cannot be used are NaN. The file is written batch by
    batch. In Parquet, whose texts are UTF-8, ``paths`` are bytes if a name is not. Under ``python -m mmmilan.torchrun``
    each process takes a part of the images.

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
        InputError: an image is missing, none can be read, the checkpoint is that of a detector or segmentor, or the
            file must not or cannot be written.

    Examples:
        >>> mmmilan.embed('photos', 'runs/photos/milan.pth', 'photos.npz')
        >>> numpy.load('photos.npz')['class_token'].shape
        (3068, 768)
    """
    import numpy as np
    from mmengine.dist import is_main_process

    from mmmilan.api.inference import Inferencer
    from mmmilan.api.models import build_embedder
    from mmmilan.datasets.image_folder import as_sources, list_images
    from mmmilan.engine.distributed import joined, on_main
    from mmmilan.evaluation.feature_files import check_features_output, write_features
    from mmmilan.evaluation.features import fingerprint

    with joined():
        on_main(lambda: check_features_output(out, [checkpoint, *as_sources(images)], overwrite))
        path, files = Path(out), list_images(images)
        reader = Inferencer(checkpoint, device=device)
        embedder = build_embedder(reader.model, checkpoint)

        def encode(inputs: Tensor) -> dict[str, Tensor]:
            features = embedder(inputs)
            return {name: rows for name, rows in features.items() if patches or name != 'patch_tokens'}

        model = fingerprint(embedder.backbone)
        options = dict(batch_size=batch_size, num_workers=num_workers, option='num_workers')
        batches = reader.extract(files, encode, 'Features', **options)
        columns = (rows | dict(model=np.full(len(rows['ok']), model)) for rows in add_rows(files, batches))
        if is_main_process():
            write_features(path, len(files), columns, as_bytes=not is_utf8(files))
        else:
            deque(columns, maxlen=0)
    return path


def is_utf8(names: Iterable[str]) -> bool:
    """Whether all names of files are UTF-8, as text in Parquet must be."""
    try:
        return all(name.encode() for name in names)
    except UnicodeEncodeError:
        return False


def add_rows(files: Sequence[str], batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """The columns of each batch, with rows of NaN for the files that were left out."""
    import numpy as np

    begin, width = 0, max(map(len, files))

    def columns(end: int, found: np.ndarray, batch: Arrays) -> Arrays:
        ok = np.isin(np.arange(begin, end), found)
        rows = dict(paths=np.array(files[begin:end], f'U{width}'), ok=ok)
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
