"""The containers of ``torch.save`` (zip, and the older stream) and of TorchScript, opened by hand.

Each size is compared with the file before memory is taken, each checksum with the content. A TorchScript archive gives
its tensors, found by the names of its modules.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mmmilan.checkpoints.unpickling import DataUnpickler, ScriptModule, Storage, check_tree

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_archive(path: Path) -> Any:
    """What ``torch.save`` wrote, or the state dict of a TorchScript archive.

    Raises:
        ForbiddenName: it is more than data.
        Exception: of any type, if the file is damaged.
    """
    with path.open('rb') as file:
        content = read_zip(file) if file.read(2) == b'PK' else read_stream(file)
        check_tree(content, file.seek(0, os.SEEK_END))
    return state_of(content) if isinstance(content, ScriptModule) else content


def read_meta(path: Path) -> Any:
    """``meta`` of a checkpoint of ``torch.save``, without reading its weights.

    Raises:
        Exception: of any type, if the file is damaged or holds none.
    """
    with path.open('rb') as file:
        return read_zip(file, weights=False)['meta']


def check_archive(path: Path) -> None:
    """Compare all checksums of a checkpoint of ``torch.save``.

    Raises:
        Exception: of any type, if the file is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f'the checksum of its {damaged} is wrong')


def read_zip(file: BinaryIO, weights: bool = True) -> Any:
    """The zip of ``torch.save`` or ``torch.jit.save``; each of its files has a checksum.

    Args:
        file: The file.
        weights: Whether the tensors are read; else their content is undefined.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition('/')[2]: info for info in archive.infolist()}
        # TorchScript packs its code, which is not read
        plain = {name: info for name, info in members.items() if info.compress_type == zipfile.ZIP_STORED}
        if sum(info.file_size for info in plain.values()) > size or len(members) != len(archive.infolist()):
            raise ValueError('an archive larger than its file')
        if 'byteorder' in plain and archive.read(plain['byteorder']) != b'little':
            raise ValueError('numbers in another byte order')

        def load_memory(key: str, nbytes: int) -> Tensor:
            info = plain[f'data/{key}']
            if info.file_size != nbytes:
                raise ValueError(f'{info.file_size} bytes in place of {nbytes}')
            memory = torch.empty(nbytes, dtype=torch.uint8, device='cpu')
            if weights:
                with archive.open(info) as member:
                    member.readinto(memory.numpy())  # compares the checksum
            return memory

        content = DataUnpickler(io.BytesIO(archive.read(plain['data.pkl'])), storages(load_memory)).load()
        for name, info in plain.items():
            if not name.startswith('data/'):
                archive.read(info)  # for its checksum
    return content


def read_stream(file: BinaryIO) -> Any:
    """The stream that ``torch.save`` wrote before PyTorch 1.6: pickles, then the storages one after the other."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    bounded = _Bounded(file, size)
    memories: dict[str, Tensor] = {}

    def take_memory(key: str, nbytes: int) -> Tensor:  # filled below
        if sum(map(len, memories.values())) + nbytes > size:
            raise ValueError(f'{nbytes} bytes in a file of {size}')
        memories[key] = torch.zeros(nbytes, dtype=torch.uint8, device='cpu')
        return memories[key]

    load_storage = storages(take_memory)
    magic, protocol, _ = (DataUnpickler(bounded, load_storage).load() for _ in range(3))
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise ValueError('a pickle that torch.save did not write')
    content = DataUnpickler(bounded, load_storage).load()
    keys = DataUnpickler(bounded, load_storage).load()
    if set(keys) != set(memories):
        raise ValueError('other storages than its tensors have')
    for key in keys:
        (count,) = struct.unpack('<q', bounded.read(8))
        if count * load_storage.dtypes[key].itemsize != len(memories[key]):
            raise ValueError(f'{count} numbers in place of {len(memories[key])} bytes')
        if file.readinto(memories[key].numpy()) != len(memories[key]):
            raise EOFError('the file ends too early')
    return content


class storages:
    """Finds the storage of a persistent id, by the memory that ``load_memory`` gives for its key and its bytes."""

    def __init__(self, load_memory: Callable[[str, int], Tensor]) -> None:
        self.load_memory = load_memory
        self.memories: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def __call__(self, identity: tuple) -> Storage:
        kind, dtype, key, _, count, *view = identity
        if kind != 'storage' or not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
            raise ValueError(f'{kind} is no storage of numbers')
        if view not in ([], [None]):
            raise ValueError('a view of a storage, as of before PyTorch 0.4')
        if key not in self.memories:
            self.memories[key] = self.load_memory(str(key), count * dtype.itemsize)
            self.dtypes[key] = dtype
        return Storage(self.memories[key], dtype)


class _Bounded:
    """A file that is not asked for more than it has, which would take memory."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise EOFError('the file ends too early')
        return self.file.read(count)


def state_of(module: ScriptModule, prefix: str = '') -> dict[str, Tensor]:
    """The tensors of a TorchScript module and of those in it, by name."""
    state: dict[str, Tensor] = {}
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            state[f'{prefix}{name}'] = value
        elif isinstance(value, ScriptModule):
            state |= state_of(value, f'{prefix}{name}.')
    return state
