"""Captioned images in tar shards, read by offset and one shard after the other."""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.fileio import register_backend
from mmengine.fileio.backends import BaseStorageBackend
from mmengine.logging import print_log
from rich.progress import track

from mmmilan.datasets.captions import CaptionedImages, decode_text
from mmmilan.datasets.image_folder import EXTENSIONS
from mmmilan.datasets.reproducible import Draw, ReproducibleSampler
from mmmilan.errors import InputError
from mmmilan.files import write_text
from mmmilan.registry import DATA_SAMPLERS, DATASETS


@DATASETS.register_module()
class CaptionedShards(CaptionedImages):
    """Captioned images in tar files, as WebDataset packs them.

    Files of a tar with the same name up to the first dot are one sample: an image, and a ``.txt`` file with one caption
    per line or a ``.json`` file with ``caption`` (one text or a list). On the first use of a tar, all its headers are
    read and the offsets of its images are written to ``NAME.tar.index.json``; images are then read by offset. With
    ``ShardSampler`` one shard is read after the other.

    Args:
        data_root: Folder of the tar files.
        kwargs: Other arguments of :class:`CaptionedImages`, except ``captions``.

    Raises:
        InputError: there is no tar file, or one is damaged.
    """

    def __init__(self, data_root: str, **kwargs) -> None:
        self.shard_sizes: list[int] = []
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        shards = sorted(path for path in Path(self.data_root).glob('*.tar') if path.is_file())
        if not shards:
            raise InputError(f'The folder {self.data_root} holds no .tar file; set data_root to the shards.')
        samples = []
        for shard in track(shards, 'Tar shards', transient=True):
            count = len(samples)
            for path, captions in load_index(shard):
                if captions:
                    samples.append(dict(img_path=path, captions=captions))
                else:
                    self.reject(f'{path} has no caption; complete or remove it.')
            self.shard_sizes.append(len(samples) - count)
        if not samples:
            raise InputError(f'The tar files in {self.data_root} hold no image with a caption; set another data_root.')
        return samples


def load_index(shard: Path) -> list[tuple[str, list[str]]]:
    """Path (for :class:`TarBackend`) and captions of each image of a tar; an index beside the tar is read or written.

    Raises:
        InputError: the tar is damaged.
    """
    path = shard.with_name(f'{shard.name}.index.json')
    stamp = [shard.stat().st_size, shard.stat().st_mtime_ns]
    index = stored_index(path)
    if index.get('stamp') != stamp:
        index = dict(stamp=stamp, samples=read_index(shard))
        try:
            write_text(path, json.dumps(index))
        except InputError as error:  # a read-only disk
            print_log(f'{error} The tar will be indexed again next time.', logger='current', level=logging.WARNING)
    return [(f'tar://{shard}/{name}@{offset}+{size}', texts) for name, offset, size, texts in index['samples']]


def stored_index(path: Path) -> dict:
    """The stored index of a tar; {} if it is missing or damaged, and must be made again."""
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
        for name, offset, size, texts in index['samples']:
            assert isinstance(name, str) and isinstance(texts, list) and offset + size >= 0
        return index
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return {}


def read_index(shard: Path) -> list[tuple[str, int, int, list[str]]]:
    """Name, offset, size and captions of each image of a tar, from the tar itself.

    Raises:
        InputError: the tar is damaged.
    """
    images: dict[str, tuple[str, int, int]] = {}
    captions: dict[str, list[str]] = {}
    try:
        with tarfile.open(shard, 'r:') as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, _, name = member.name.rpartition('/')
                sample, _, extension = name.partition('.')
                sample = f'{folder}/{sample}'
                if f'.{extension.lower()}' in EXTENSIONS:
                    images[sample] = member.name, member.offset_data, member.size
                elif extension in ('txt', 'json'):
                    captions.setdefault(sample, []).extend(read_captions(tar.extractfile(member).read(), extension))
    except (tarfile.TarError, ValueError) as error:
        raise InputError(f'{shard} is damaged ({error}); copy or download it again.') from error
    return [(*image, captions.get(sample, [])) for sample, image in images.items()]


def read_captions(content: bytes, extension: str) -> list[str]:
    """The captions in a ``.txt`` or ``.json`` file of a sample; [] if the file is malformed."""
    try:
        texts = decode_text(content)
        texts = texts.split('\n') if extension == 'txt' else json.loads(texts).get('caption') or []
    except (ValueError, AttributeError, RecursionError):
        return []
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


@register_backend('mmmilan.tar', prefixes='tar')
class TarBackend(BaseStorageBackend):
    """MMEngine's file backend for a part of a tar: ``tar://SHARD.tar/NAME@OFFSET+SIZE``."""

    PATH = re.compile(r'tar://(.+?\.tar)/.+@(\d+)\+(\d+)', re.DOTALL)

    def get(self, filepath: str) -> bytes:
        shard, offset, size = self.PATH.fullmatch(filepath).groups()
        with open(shard, 'rb') as file:
            file.seek(int(offset))
            return file.read(int(size))

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        return self.get(filepath).decode(encoding)

    def exists(self, filepath: str) -> bool:
        return Path(self.PATH.fullmatch(filepath)[1]).is_file()


@DATA_SAMPLERS.register_module()
class ShardSampler(ReproducibleSampler):
    """Shards of a :class:`CaptionedShards` in random order, and the samples of each in random order.

    All processes read the same shard at the same time, so that a disk is read nearly sequentially. The arguments are
    those of MMEngine's ``DefaultSampler``, except ``shuffle``.
    """

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        sizes = torch.tensor(self.dataset.shard_sizes)
        starts = sizes.cumsum(0) - sizes
        shards = torch.randperm(len(sizes), generator=generator).tolist()
        order = [starts[shard] + torch.randperm(int(sizes[shard]), generator=generator) for shard in shards]
        order = torch.cat(order)
        order = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        own = order[self.rank : self.total_size : self.world_size].tolist()
        return (Draw(self.seed, self.epoch, index) for index in own)
