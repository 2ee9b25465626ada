"""Features of many images: the one loop of every evaluation and command, in as many processes as there are."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import all_gather_object, get_dist_info, is_main_process
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mmmilan.errors import InputError, count, warn
from mmmilan.workers import check_workers, default_workers, read_batches

Step, Batch = TypeVar('Step'), TypeVar('Batch')
Arrays = dict[str, np.ndarray]

OUT_TYPE = threading.Lock()  # held while an encoder has another out_type than its own


def extract(
    dataset: Dataset,
    normalise: nn.Module,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    description: str = '',
    **options: Any,
) -> Iterator[Arrays]:
    """Encode the images of a data set, batch by batch and in order.

    Args:
        dataset: Packs ``inputs`` (uint8 [3, H, W]), and maybe ``data_samples`` with labels.
        normalise: The model's data preprocessor.
        encode: Function from normalised images [B, 3, H, W] to tensors [B, ...] by name.
        description: What the progress bar says; no bar without it.
        options: As for :func:`each_batch`, which also says what is left out, yielded and raised.

    Yields:
        Arrays [B, ...] by name, floating-point ones in float32: those of ``encode``, ``position`` in ``indices``, and
        ``label`` if the images are labelled.
    """

    def encoded(batch: tuple[Tensor, Arrays], positions: np.ndarray) -> Arrays:
        images, labels = batch
        rows = encode(normalise(dict(inputs=images), False)['inputs'])
        return labels | {
            name: (each.float() if each.is_floating_point() else each).cpu().numpy() for name, each in rows.items()
        }

    return each_batch(dataset, _stack, encoded, description, **options)


def each_batch(
    dataset: Dataset,
    collate: Callable[[list[dict]], Batch],
    compute: Callable[[Batch, np.ndarray], Arrays],
    description: str = '',
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    begin: int = 0,
    batch_size: int = 64,
    num_workers: int | None = None,
    option: str = '',
    skip: bool = True,
    shared: bool = True,
) -> Iterator[Arrays]:
    """Compute something for the images of a data set, batch by batch and in order.

    Images that cannot be used are left out: named in the log and counted at the end.

    Args:
        dataset: Gives a dict for each image.
        collate: Function from these dicts to a batch; it runs in the processes that read images.
        compute: Function from a batch, and the positions [B] of its images in ``indices``, to arrays [B, ...] by name.
        description: What the progress bar says; no bar without it.
        indices: The images, by default all.
        begin: Position of the first one, after those that a stopped run did.
        batch_size: Number of images that the model sees at once.
        num_workers: Number of processes that read images, by default one per core and at most 8,
            and none in a daemonic process, which can start none.
        option: What sets ``num_workers``, for messages.
        skip: False stops at an image that cannot be used.
        shared: Each process of a distributed run takes a part of the images, and every one gets all arrays; False:
            each process has images of its own.

    Yields:
        What ``compute`` gives, and ``position``.

    Raises:
        InputError: no image can be used, or ``skip`` is False and one cannot; a process that reads images died, or
            cannot be started.
    """
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    rank, world_size = get_dist_info() if shared else (0, 1)
    left = len(chosen) - begin
    share = begin + np.arange(rank, world_size * -(-left // world_size), world_size) % max(left, 1)
    if num_workers is None:
        num_workers = min(default_workers(8), len(share) // batch_size)
    elif num_workers:
        check_workers([option or 'num_workers'])
    images = _Images(dataset, chosen, share)
    loader = DataLoader(images, batch_size, num_workers=num_workers, collate_fn=partial(_divide, collate))
    faults, last = {}, -1
    for batch in progress(read_batches(loader, option), description, len(loader)):
        part = _compute(batch, compute), batch.faults
        parts = all_gather_object(part) if shared else [part]
        for position, fault in sorted(item for _, each in parts for item in each.items()):
            if not skip:
                raise InputError(fault)
            if position not in faults:
                warn(f'Left out: {fault}')
            faults[position] = fault
        used = [arrays for arrays, _ in parts if arrays]
        if not used:
            continue
        arrays = {name: np.concatenate([each[name] for each in used]) for name in used[0]}
        positions, order = np.unique(arrays['position'], return_index=True)
        order = order[positions > last]  # the shares of all processes have one length, so the first images come again
        if len(order):
            last = int(positions[-1])
            yield {name: rows[order] for name, rows in arrays.items()}
    if faults and len(faults) == len(chosen):
        cause = next(iter(faults.values())).partition(';')[0]
        raise InputError(f'Of {count(len(chosen), "image")} none can be used ({cause}); give images.')
    if faults:
        warn(f'{len(faults)} of {len(chosen)} images were left out, see above.')


def evenly_spaced(size: int, count: int) -> list[int]:
    """Up to ``count`` evenly spaced indices below ``size``, the first and the last included."""
    return np.linspace(0, size - 1, min(size, count)).astype(int).tolist()


def join(batches: Iterable[Arrays]) -> Arrays:
    """The arrays [M, ...] of all batches, of which there is one at least."""
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


class _Divided(NamedTuple):
    """A batch of the images of a data set that can be used, their positions, and why others cannot, by position."""

    content: Any
    positions: np.ndarray
    faults: dict[int, str]


class _Images(Dataset):
    """Some images of a data set with their positions; for one that cannot be used, what is wrong with it."""

    def __init__(self, dataset: Dataset, indices: np.ndarray, share: np.ndarray) -> None:
        self.indices, self.share = indices, share
        self.read = getattr(dataset, 'prepare_data', dataset.__getitem__)  # ImageFolder replaces an image by another

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, index: int) -> tuple[int, dict | str]:
        position = int(self.share[index])
        try:
            return position, self.read(int(self.indices[position]))
        except InputError as error:
            return position, str(error)


def _divide(collate: Callable[[list[dict]], Batch], items: list[tuple[int, dict | str]]) -> _Divided:
    usable = {position: sample for position, sample in items if not isinstance(sample, str)}
    content = collate(list(usable.values())) if usable else None
    faults = {position: sample for position, sample in items if position not in usable}
    return _Divided(content, np.array(list(usable)), faults)


def _stack(samples: list[dict]) -> tuple[Tensor, Arrays]:
    """Images [B, 3, H, W], and their labels if they have some."""
    records = [sample.get('data_samples', ()) for sample in samples]
    labelled = 'gt_label' in records[0]
    labels = dict(label=np.array([int(record.gt_label) for record in records])) if labelled else {}
    return torch.stack([sample['inputs'] for sample in samples]), labels


@torch.no_grad()
def _compute(batch: _Divided, compute: Callable[[Batch, np.ndarray], Arrays]) -> Arrays:
    return dict(position=batch.positions) | compute(batch.content, batch.positions) if len(batch.positions) else {}


def progress(steps: Iterable[Step], description: str, total: int | None = None) -> Iterable[Step]:
    """Go through steps with a progress bar on stderr of the main process, if there are several steps."""
    total = len(steps) if total is None else total
    shown = description and total > 1 and is_main_process()
    return track(steps, description, total, console=Console(stderr=True), disable=not shown)


def choose_device(device: str | None) -> str:
    """The device that the user chose; by default 'cuda' if there is a GPU, else 'cpu'."""
    return device or ('cuda' if torch.cuda.is_available() else 'cpu')


def device_name(device: str) -> str:
    """The name of the GPU, or the number of threads on a CPU."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_name()
    return f'a CPU ({count(torch.get_num_threads(), "thread")})'


class Embedder(nn.Module):
    """Features of whole images, by name: for export to ONNX and for files of features.

    Args:
        backbone: A ViT of mmpretrain's kind with a class token, such as :class:`MILANViT`.
        joint: What projects its tokens [B, T, D] to the joint space of image and text [B, T, C]: a linear layer, or a
            decoder, by its ``project``; None if nothing does.

    Raises:
        InputError: the backbone gives feature maps and no tokens, as those of detectors and segmentors.
    """

    def __init__(self, backbone: nn.Module, joint: nn.Module | None = None) -> None:
        super().__init__()
        check_tokens(backbone)
        self.backbone = backbone
        self.backbone.out_type = 'raw'
        self.joint = joint

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [B, 3, H, W] -> features by name.

        Returns:
            ``class_token`` and ``mean_token`` [B, D], ``patch_tokens`` [B, N, D], and with a joint space ``embedding``
            [B, C], that of the class token, of length 1.
        """
        tokens = self.backbone(images)[-1]
        features = split_tokens(self.backbone, tokens)
        if self.joint is not None:
            project = getattr(self.joint, 'project', self.joint)
            features['embedding'] = F.normalize(project(tokens[:, :1])[:, 0].float(), dim=-1)
        return features


def check_tokens(backbone: nn.Module) -> None:
    """Raise an :class:`InputError` if a backbone gives no tokens."""
    if 'raw' not in getattr(backbone, 'OUT_TYPES', ()) or not hasattr(backbone, 'out_type'):
        raise InputError(
            f'The encoder of this model, a {type(backbone).__name__}, gives feature maps and no tokens of an image; '
            'give the checkpoint that the detector or segmentor started from.'
        )


def fingerprint(encoder: nn.Module) -> str:
    """16 hexadecimal digits that tell the weights of an encoder from others, on any device."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def split_tokens(backbone: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """All tokens of a ViT [B, 1 + N, D] -> ``class_token`` and ``mean_token`` [B, D], ``patch_tokens`` [B, N, D]."""
    patches = tokens[:, 1:]
    mean = patches.mean(1)
    if hasattr(backbone, 'ln2'):  # of a classifier on the mean token
        mean = backbone.ln2(mean)
    return dict(class_token=tokens[:, 0], mean_token=mean, patch_tokens=patches)


def output_as(out_type: str, backbone: nn.Module, images: Tensor) -> Tensor:
    """What an encoder gives of normalised images with an ``out_type``, whatever its own is."""
    with OUT_TYPE:  # another thread may want another type of the same encoder
        own, backbone.out_type = backbone.out_type, out_type
        try:
            return backbone(images)[-1]
        finally:
            backbone.out_type = own


def class_and_mean(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """``class_token`` and ``mean_token`` [B, D] of normalised images, whatever ``out_type`` the encoder has."""
    features = split_tokens(backbone, output_as('raw', backbone, images))
    return {name: features[name] for name in ('class_token', 'mean_token')}
