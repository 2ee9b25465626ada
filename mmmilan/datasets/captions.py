"""Captioned images: in folders with a table, a COCO JSON file or text files of captions, and in tar shards."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.fileio import register_backend
from mmengine.fileio.backends import BaseStorageBackend
from mmengine.logging import print_log
from rich.progress import track

from mmmilan.datasets.image_folder import EXTENSIONS, ImageFolder
from mmmilan.datasets.reproducible import Draw, ReproducibleSampler
from mmmilan.errors import InputError
from mmmilan.files import write_text
from mmmilan.registry import DATA_SAMPLERS, DATASETS, TRANSFORMS


@DATASETS.register_module()
class CaptionedImages(ImageFolder):
    """Images in a folder and their captions; ``results['captions']`` holds all texts of an image.

    Args:
        data_root: Folder of the images.
        captions: A ``.csv`` or ``.tsv`` file with columns ``image`` (path below ``data_root``) and ``caption``, in
            which an image may have several rows; or a ``.json`` file in COCO's format of captions. None reads the text
            file of the same name beside each image, one caption per line.
        on_corrupt: What to do with an image that is missing, does not decode or has no caption: 'skip' leaves it out
            and names it in the log; 'raise' stops.
        kwargs: Other arguments of :class:`ImageFolder`.

    Raises:
        InputError: a file is missing or in no known format, or no image is left.
    """

    def __init__(self, data_root: str, captions: str | None = None, **kwargs) -> None:
        self.captions = Path(captions) if captions else None
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        texts: dict[str, list[str]] = {}
        for place, image, caption in self.read_rows():
            if not isinstance(image, str) or not isinstance(caption, str) or not caption.strip() or not image:
                self.reject(f'{place} has no {"caption" if image else "image"}; complete or remove it.')
                continue
            texts.setdefault(image, []).append(caption.strip())
        if not texts:
            raise InputError(f'{self.captions or self.img_prefix} has no image with a caption; give another one.')
        return [dict(img_path=str(Path(self.img_prefix, image)), captions=texts[image]) for image in texts]

    def read_rows(self) -> Iterable[tuple[str, str | None, str | None]]:
        """The place of each caption in its file (for messages), its image (path below the folder) and its text."""
        if self.captions is None:
            return self.read_text_files()
        if not self.captions.is_file():
            raise InputError(f'The captions file {self.captions} does not exist; correct captions=.')
        readers = {'.csv': read_table, '.tsv': read_table, '.json': read_coco}
        if self.captions.suffix not in readers:
            raise InputError(
                f'The captions file {self.captions} is in no known format; give one that ends in {", ".join(readers)}.'
            )
        return readers[self.captions.suffix](self.captions)

    def read_text_files(self) -> Iterator[tuple[str, str, str]]:
        """As :meth:`read_rows`, from the text files beside the images; an image without caption gives ''."""
        for info in super().load_data_list():
            image = Path(info['img_path'])
            path = image.with_suffix('.txt')
            try:
                lines = read_text(path).split('\n') if path.is_file() else []
            except InputError as error:
                self.reject(str(error))
                continue
            for line in [line for line in lines if line.strip()] or ['']:
                yield str(path), str(image.relative_to(self.img_prefix)), line

    def reject(self, fault: str) -> None:
        """Leave out an entry, with a warning in the log; or stop, if ``on_corrupt`` says so."""
        if self.on_corrupt == 'raise':
            raise InputError(fault)
        print_log(f'Skipped: {fault}', logger='current', level=logging.WARNING)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        InputError: the file is in another encoding.
    """
    content = path.read_bytes()
    try:
        return decode_text(content)
    except UnicodeDecodeError as error:
        raise InputError(f'{path} is not in UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8.') from error


def decode_text(content: bytes) -> str:
    """Text from UTF-8, or from UTF-16 with a byte order mark."""
    return content.decode('utf-16' if content.startswith((b'\xff\xfe', b'\xfe\xff')) else 'utf-8-sig')


def read_table(path: Path) -> Iterator[tuple[str, str | None, str | None]]:
    """Rows of a CSV or TSV file with columns image and caption, as :meth:`CaptionedImages.read_rows` gives them.

    Raises:
        InputError: a column is missing, or the file is not a valid table.
    """
    rows = csv.DictReader(
        io.StringIO(read_text(path), newline=''), delimiter='\t' if path.suffix == '.tsv' else ',', strict=True
    )
    try:
        if not {'image', 'caption'} <= set(rows.fieldnames or ()):
            raise InputError(f'{path} lacks a column named image or caption; name them in its first row.')
        for row in rows:
            yield f'{path}, line {rows.line_num},', row['image'], row['caption']
    except csv.Error as error:  # such as an unclosed quotation mark, which would swallow the rows after it
        raise InputError(f'{path}, line {rows.line_num}: {error}; correct the quotation marks there.') from error


def read_coco(path: Path) -> Iterator[tuple[str, str | None, str | None]]:
    """Captions in COCO's format, in which ``annotations`` name ``images`` by id.

    Raises:
        InputError: the file is not in this format.
    """
    try:
        content = json.loads(read_text(path))
        images = {image['id']: image['file_name'] for image in content['images']}
        rows = [(row['image_id'], row['caption']) for row in content['annotations']]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is not in COCO's format of captions ({type(error).__name__}: {error}); mend it, or give a .csv."
        ) from error
    for number, (image, caption) in enumerate(rows):
        yield f'{path}, annotation {number} of image {image},', images.get(image), caption


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


@TRANSFORMS.register_module()
class TokenizeCaption(BaseTransform):
    """Tokenize ``results['captions']`` into ``results['text']``, int64.

    Args:
        context_length: Number of tokens L; longer texts are truncated.
        all_captions: Give all texts of the image [T, L], for evaluation; by default one [L], drawn at random.
    """

    def __init__(self, context_length: int = 77, all_captions: bool = False) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(context_length=context_length)
        self.all_captions = all_captions

    def transform(self, results: dict) -> dict:
        captions = results['captions']
        if self.all_captions:
            results['text'] = self.tokenizer(captions)
        else:
            results['text'] = self.tokenizer(captions[np.random.randint(len(captions))])[0]
        return results
