"""Spoil files at random, by a seed."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import torch


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """A bit flipped, an end cut off, a block zeroed, moved, doubled or made of noise."""
    content = bytearray(content)
    start = rng.randrange(len(content))
    end = min(len(content), start + 2 ** rng.randrange(1, 12))
    kind = rng.choice(['flip', 'cut', 'zero', 'noise', 'double', 'remove'])
    if kind == 'flip':
        content[start] ^= 1 << rng.randrange(8)
    elif kind == 'cut':
        del content[start:]
    elif kind == 'zero':
        content[start:end] = bytes(end - start)
    elif kind == 'noise':
        content[start:end] = rng.randbytes(end - start)
    elif kind == 'double':
        content[start:start] = content[start:end]
    else:
        del content[start:end]
    return bytes(content)


def spoil_pickle(content: bytes, rng: random.Random) -> bytes:
    """A zip of ``torch.save`` with a spoilt pickle and sound checksums."""
    spoilt = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(spoilt, 'w') as target:
        for info in source.infolist():
            part = source.read(info)
            if info.filename.endswith('data.pkl'):
                for _ in range(rng.randrange(1, 4)):
                    place = rng.randrange(len(part))
                    part = rng.choice([
                        part[:place] + bytes([rng.randrange(256)]) + part[place + 1 :],
                        part[:place] + bytes([rng.randrange(256)]) + part[place:],
                        part[:place] + part[place + 1 :],
                        spoil_bytes(part, rng) or b'.',
                    ])  # fmt: skip
            target.writestr(info.filename, part)
    return spoilt.getvalue()


ODD_VALUES = [
    None, True, -1, 10**30, float('nan'), float('inf'), '', '../../x', 'é' * 1000, b'\0', [], [[]], {}, {'': {}},
    {1: 2}, torch.tensor(float('nan')), torch.zeros(0), torch.zeros(3, 5), torch.zeros(2, dtype=torch.int64),
    torch.ones(4, dtype=torch.bool), torch.zeros(1, dtype=torch.complex64), torch.full((2, 2), float('inf')),
]  # fmt: skip


def spoil_values(checkpoint: Any, rng: random.Random) -> Any:
    """A checkpoint of which one to three values are replaced by odd ones, removed, or renamed."""
    spoilt = _copy(checkpoint)
    for _ in range(rng.randrange(1, 4)):
        holder = spoilt
        while True:  # down to some level
            key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            inner = holder[key]
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.15:
                break
            holder = inner
        kind = rng.choice(['replace', 'replace', 'spoil', 'remove', 'rename'])
        if kind == 'spoil' and isinstance(inner, torch.Tensor) and inner.numel():
            holder[key] = rng.choice([inner[None], inner.flatten()[:-1], inner.int(), inner * float('nan'), inner > 0])
        elif kind == 'remove':
            del holder[key]
        elif kind == 'rename' and isinstance(holder, dict):
            holder[f'{key}x'] = holder.pop(key)
        else:
            holder[key] = rng.choice(ODD_VALUES)
        if not spoilt:
            break
    return spoilt


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value


def write(path: Path, content: bytes | dict) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path
