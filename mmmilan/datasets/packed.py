"""Images in few large files: tar shards, with captions, and an LMDB.

Millions of small files are slow on some disks and networks. Shards are read by offset, one after the other. An LMDB has
the paths of the images relative to a folder as keys and their files, unchanged, as values; MMEngine's LMDB backend
reads it: ``backend_args=dict(backend='lmdb', db_path=...)``.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from mmengine.fileio import register_backend
from mmengine.fileio.backends import BaseStorageBackend
from rich.progress import track
from torch import Tensor

from mmmilan.datasets.decoding import ARCHIVES, EXTENSIONS
from mmmilan.datasets.listing import is_leaving
from mmmilan.datasets.reproducible import ReproducibleSampler
from mmmilan.errors import InputError, count, warn
from mmmilan.files import atomic_folder, check_output_folder, decode_text, extension, write_text
from mmmilan.registry import DATA_SAMPLERS

VERSION = 2  # of the stored index
CAPTIONS = ('.txt', '.json')
# The first bytes of gzip, bzip2, xz, zstd, 7z, RAR and ZIP.
COMPRESSED = re.compile(rb'\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|PK\x03\x04')
COMMIT_EVERY = 10000  # images that an LMDB takes in one transaction


class Index(NamedTuple):
    """What a shard holds.

    Attributes:
        samples: Path (for :class:`TarBackend`) and captions of each image.
        unused: Number of other members by kind.
    """

    samples: list[tuple[str, list[str]]]
    unused: dict[str, int]


def load_index(shard: Path) -> Index:
    """The images and captions of a tar.

    On the first use of a tar, all its headers are read, and an index is written beside it, to ``NAME.tar.index.json``.

    Raises:
        InputError: the tar is damaged or cannot be read.
    """
    path = shard.with_name(f'{shard.name}.index.json')
    try:
        state = shard.stat()
    except OSError as error:
        raise InputError(f'{shard} cannot be read ({error.strerror}); correct it, or leave it out.') from error
    stamp = [VERSION, state.st_size, state.st_mtime_ns]
    index = stored_index(path, stamp)
    if not index:
        samples, unused = read_index(shard)
        index = dict(stamp=stamp, samples=samples, unused=unused)
        try:
            write_text(path, json.dumps(index))
        except InputError as error:  # a read-only disk
            warn(f'{error} The tar will be indexed again next time.')
    samples = [(f'tar://{shard}/{name}@{offset}+{size}', texts) for name, offset, size, texts in index['samples']]
    return Index(samples, index['unused'])


def stored_index(path: Path, stamp: list[int]) -> dict:
    """The stored index of a tar; {} if it is missing, damaged or of another tar, and must be made again."""
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
        assert index['stamp'] == stamp
        for name, offset, size, texts in index['samples']:
            assert (
                isinstance(name, str)
                and '\0' not in name
                and all(isinstance(text, str) for text in texts)
                and isinstance(texts, list)
            )
            assert type(offset) is int and type(size) is int and 0 <= offset <= offset + size <= stamp[1]
        assert all(isinstance(kind, str) and type(count) is int for kind, count in index['unused'].items())
        return index
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError):
        return {}


def read_index(shard: Path) -> tuple[list[tuple[str, int, int, list[str]]], dict[str, int]]:
    """The images of a tar, from the tar itself, and what was not used.

    Returns:
        Name, offset, size and captions of each image, in the tar's order; and the number of unused members by kind.

    Raises:
        InputError: the tar is damaged.
    """
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, list[str]] = {}
    unused: Counter[str] = Counter()
    try:
        with tarfile.open(shard, 'r:') as tar:
            for member in tar:
                kind = extension(member.name)
                if member.isdir():
                    continue
                if any(is_leaving(part) for part in member.name.split('/') if part not in ('.', '..')):
                    unused['hidden'] += 1
                elif not member.isfile():
                    unused['links'] += 1
                elif '\0' in member.name:  # which no file name has
                    unused['with a zero byte in the name'] += 1
                elif kind in EXTENSIONS:
                    unused['of the same name'] += member.name in images
                    images[member.name] = member.offset_data, member.size
                elif kind in CAPTIONS and (found := read_captions(tar.extractfile(member).read(), kind)):
                    texts[member.name] = found
                else:
                    unused[kind or 'without extension'] += 1
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        refuse_archive(shard)
        raise InputError(f'{shard} is damaged ({error}); copy or download it again.') from error
    pairs = pair_by_name(list(images), list(texts))
    used = {text for names in pairs.values() for text in names}
    unused.update(f'{extension(text)} without image' for text in texts if text not in used)
    captions = {image: [line for text in names for line in texts[text]] for image, names in pairs.items()}
    return [(name, *place, captions[name]) for name, place in images.items()], dict(+unused)


def refuse_archive(path: str | os.PathLike) -> None:
    """Raise an :class:`InputError` for a compressed file: by its ending, or else, as a tar, by its first bytes."""
    path = os.path.normpath(path)
    kind = extension(path)
    found = kind in ARCHIVES and os.path.isfile(path)
    if kind in ('', '.tar'):
        with suppress(OSError), open(path, 'rb') as file:  # a folder is none
            found = bool(COMPRESSED.match(file.read(8)))
    if found:
        raise InputError(
            f'{path} is compressed, and images are not read out of it; unpack it and give the folder, or give a tar '
            'that is not compressed.'
        )


def pair_by_name(images: Sequence[str], texts: Sequence[str]) -> dict[str, list[str]]:
    """The files of captions of each image: those with the longest stem in common, dots within names included.

    ``10.11.12.txt`` belongs to ``10.11.12.jpg``; where there is no image of its own name, ``7.en.txt`` belongs to
    ``7.jpg``, ``7.txt`` to ``7.left.jpg``, and ``7.caption.txt`` to ``7.image.jpg``. Stems that differ in numbers are
    different images; composed accents and others are the same.
    """
    pairs: dict[str, list[str]] = {image: [] for image in images}
    whole: dict[str, list[str]] = {}  # 'a/7.left' -> images of this stem
    parts: dict[str, list[str]] = {}  # 'a/7' -> images whose stem begins so
    for image in images:
        first, *shorter = stems(image)
        whole.setdefault(first, []).append(image)
        for stem in shorter:
            parts.setdefault(stem, []).append(image)
    orphans = []
    for text in texts:
        found = next((whole[stem] for stem in stems(text) if stem in whole), ())
        for image in found:
            pairs[image].append(text)
        if not found:
            orphans.append(text)
    alone = {image for image, found in pairs.items() if not found}
    for text in orphans:
        own = stems(text)[0]
        for stem in stems(text):
            found = [image for image in parts.get(stem, ()) if image in alone]
            rest = own[len(stem) :] + ''.join(stems(image)[0][len(stem) :] for image in found)
            if found and (stem == own or not any(map(str.isdigit, rest))):
                for image in found:
                    pairs[image].append(text)
                break
    return pairs


def stems(name: str) -> list[str]:
    """The name without its extension, then without each further part after a dot: 'a/7.x.jpg' -> 'a/7.x', 'a/7'."""
    folder, slash, base = unicodedata.normalize('NFC', name).rpartition('/')
    parts = base.split('.')
    return [folder + slash + '.'.join(parts[:end]) for end in range(max(1, len(parts) - 1), 0, -1)]


def read_captions(content: bytes, kind: str) -> list[str]:
    """The captions in a ``.txt`` or ``.json`` file of a sample; [] if the file is malformed."""
    try:
        texts = decode_text(content)
        texts = texts.split('\n') if kind == '.txt' else json.loads(texts).get('caption') or []
    except (ValueError, AttributeError, RecursionError):
        return []
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


@register_backend('mmmilan.tar', prefixes='tar')
class TarBackend(BaseStorageBackend):
    """MMEngine's file backend for a part of a tar: ``tar://SHARD.tar/NAME@OFFSET+SIZE``."""

    PATH = re.compile(r'tar://(.+)@(\d+)\+(\d+)', re.DOTALL)

    def locate(self, filepath: str) -> tuple[str, int, int]:
        """Tar, offset and size; folders on the way may end in ``.tar`` too.

        Raises:
            InputError: this is not such a path.
            FileNotFoundError: there is no such tar.
        """
        match = self.PATH.fullmatch(filepath)
        if not match or '.tar/' not in match[1].lower():
            raise InputError(f'{filepath} is no part of a tar; write tar://SHARD.tar/NAME@OFFSET+SIZE.')
        for cut in re.finditer(r'\.tar(?=/)', match[1], re.IGNORECASE):
            if os.path.isfile(match[1][: cut.end()]):
                return match[1][: cut.end()], int(match[2]), int(match[3])
        raise FileNotFoundError(filepath)

    def get(self, filepath: str) -> bytes:
        shard, offset, size = self.locate(filepath)
        with open(shard, 'rb') as file:
            file.seek(offset)
            return file.read(size)

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        return self.get(filepath).decode(encoding)

    def exists(self, filepath: str) -> bool:
        try:
            return bool(self.locate(filepath))
        except FileNotFoundError:
            return False


@DATA_SAMPLERS.register_module()
class ShardSampler(ReproducibleSampler):
    """Shards of a :class:`CaptionedShards` in random order, and the samples of each in random order.

    All processes read the same shard at the same time, so that a disk is read nearly sequentially. The arguments are
    those of MMEngine's ``DefaultSampler``, except ``shuffle``.
    """

    def order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        sizes = torch.tensor(self.dataset.shard_sizes)
        starts = sizes.cumsum(0) - sizes
        shards = torch.randperm(len(sizes), generator=generator).tolist()
        return torch.cat([starts[shard] + torch.randperm(int(sizes[shard]), generator=generator) for shard in shards])


def import_lmdb() -> ModuleType:
    """Import the optional package lmdb.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise InputError('Images in an LMDB need the package lmdb; run `pip install lmdb`.') from error
    return lmdb


def list_lmdb(db_path: str) -> list[str]:
    """The keys of a database, sorted.

    Raises:
        InputError: there is no such database, it cannot be read, or the package lmdb is missing.
    """
    lmdb = import_lmdb()
    if not os.path.isdir(db_path):
        raise InputError(f'The database {db_path} does not exist; make it with tools/pack_images.py.')
    try:
        with lmdb.open(db_path, readonly=True, lock=False) as database:
            # reading past the end of a memory-mapped file would kill the process without a message
            needed = (database.info()['last_pgno'] + 1) * database.stat()['psize']
            if os.path.getsize(os.path.join(db_path, 'data.mdb')) < needed:
                raise InputError(f'The database {db_path} is incomplete; copy it again, or make it again.')
            with database.begin() as transaction, transaction.cursor() as cursor:
                return [key.decode() for key in cursor.iternext(values=False)]
    except (lmdb.Error, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'The database {db_path} cannot be read ({error}); copy it again, or make it again.'
        ) from error


def pack_images(folder: Path, paths: Iterable[Path], db_path: Path) -> None:
    """Write the images at ``paths``, all below ``folder``, into a new database, whole or not at all.

    Raises:
        InputError: the database exists or cannot be written, an image cannot be read, or a name is too long or not
            ASCII (which MMEngine's backend requires).
    """
    lmdb = import_lmdb()
    if os.path.lexists(db_path):
        raise InputError(f'{db_path} exists; remove it or choose another name.')
    check_output_folder(db_path)
    try:
        # map_size limits the size of the file; no memory is taken up
        with (
            atomic_folder(db_path) as unfinished,
            lmdb.open(str(unfinished), map_size=1 << 42) as database,
        ):
            longest = database.max_key_size()
            files = [(key_of(path.relative_to(folder), longest), path) for path in paths]  # before the first is read
            transaction = database.begin(write=True)
            for i, (key, path) in enumerate(track(files, f'Packing {count(len(files), "image")}', transient=True)):
                transaction.put(key, read_image(path))
                if i % COMMIT_EVERY == COMMIT_EVERY - 1:
                    transaction.commit()
                    transaction = database.begin(write=True)
            transaction.commit()
    except lmdb.Error as error:
        raise InputError(f'{db_path} was not written ({error}); free space or choose another folder.') from error


def read_image(path: Path) -> bytes:
    """The file of an image.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f'The image {path} cannot be read ({error.strerror}); mend it, or move it away.') from error


def key_of(path: Path, longest: int) -> bytes:
    """The key of an image.

    Raises:
        InputError: it is longer than ``longest`` bytes, or not ASCII.
    """
    name = path.as_posix()
    if not name.isascii() or len(name) > longest:
        raise InputError(f'The name {name} is not ASCII, or longer than {longest}; rename it.')
    return name.encode()
