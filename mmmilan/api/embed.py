"""Write the features of many images to a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mmmilan import arguments
from mmmilan.api.feature_files import check_features_output, write_features
from mmmilan.api.progress import progress
from mmmilan.arguments import checked
from mmmilan.errors import InputError

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    import numpy as np
    from torch import Tensor

    from mmmilan.api.inference import FeatureExtractor


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
    image that does not decode are NaN.

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
    import numpy as np
    from mmengine.logging import print_log

    from mmmilan.datasets.image_folder import as_sources, list_images

    path = check_features_output(out, [checkpoint, *as_sources(images)], overwrite)
    files = list_images(images)
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
    write_features(path, columns)
    return path


def features_of(
    files: list[str],
    checkpoint: str | os.PathLike,
    batch_size: int,
    num_workers: int | None,
    device: str | None,
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of each batch of images, with a progress bar."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    from mmmilan.api.inference import FeatureExtractor
    from mmmilan.api.models import build_embedder

    extract = FeatureExtractor(checkpoint, device=device)
    embedder, normalise = build_embedder(extract.model, checkpoint), extract.model.data_preprocessor
    num_workers = min(8, os.cpu_count(), len(files) // batch_size) if num_workers is None else num_workers
    loader = DataLoader(_Images(files, extract), batch_size, num_workers=num_workers)
    for inputs, ok in progress(loader, 'Features'):
        with torch.no_grad():
            features = embedder(normalise(dict(inputs=inputs), False)['inputs'])
        batch = dict(ok=ok.numpy())
        for name, values in features.items():
            dtype = np.float16 if name == 'patch_tokens' else np.float32
            batch[name] = values.cpu().numpy().astype(dtype)
            batch[name][~batch['ok']] = np.nan
        yield batch


class _Images:
    """Data set of images, uint8 [3, H, W], and whether each could be read; an image that could not is black."""

    def __init__(self, files: list[str], extract: FeatureExtractor) -> None:
        import numpy as np

        # one array, as a list would be copied into each worker, string by string
        self.files, self.extract = np.array([os.fsencode(file) for file in files]), extract

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        import torch

        try:
            image = self.extract.load(dict(img_path=os.fsdecode(self.files[index])))
        except InputError:
            return torch.zeros(3, *self.extract.model.backbone.img_size, dtype=torch.uint8), False
        return self.extract.prepare(image)['inputs'], True
