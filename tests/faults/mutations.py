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


ODD_ARGUMENTS = [
    None, True, -1, 0, 0.5, 10**30, float('nan'), float('inf'), '', ' ', '\0', '../../x', 'é' * 300, b'x', [], [''],
    [None], {}, {1: 2}, (), torch.zeros(2), range(3), object(),
]  # fmt: skip


def misspell(name: str, rng: random.Random) -> str:
    """A name of which one letter is doubled, left out, changed or swapped with the next one."""
    place = rng.randrange(len(name))
    letter = name[place]
    return rng.choice([
        name[:place] + letter + name[place:],
        name[:place] + name[place + 1 :] if len(name) > 2 else name + 'x',
        name[:place] + rng.choice('abcdefghij') + name[place + 1 :],
        name[:place] + name[place + 1 : place + 2] + letter + name[place + 2 :],
    ])  # fmt: skip


def spoil_config(cfg: Any, rng: random.Random, kinds: tuple = ('rename', 'type', 'value', 'remove')) -> tuple:
    """A config with one mutation; returns it, the dotted key, and what was done with it."""
    while True:
        spoilt, kind = cfg.copy(), rng.choice(kinds)
        spoilt = type(cfg)(cfg.to_dict())
        holder, names = spoilt._cfg_dict, []
        while True:
            keys = list(range(len(holder))) if isinstance(holder, list) else [key for key in holder if key != 'type']
            if not keys:
                break
            key = rng.choice(keys)
            names.append(str(key))
            inner = holder[key]
            if not isinstance(inner, (dict, list)) or not inner or (isinstance(holder, dict) and rng.random() < 0.25):
                break
            holder = inner
        if not keys or not isinstance(holder, dict) or names[0] in FREE or set(names) & set(FREE):
            continue
        if kind == 'type' and 'type' in holder:
            holder['type'] = misspell(holder['type'], rng)
            return spoilt, '.'.join([*names[:-1], 'type']), kind
        if kind == 'rename':
            wrong = misspell(key, rng)
            if wrong in holder or wrong == key or not wrong.isidentifier() or len(key) < 4:
                continue
            holder[wrong] = holder.pop(key)
            return spoilt, '.'.join([*names[:-1], wrong]), kind
        if kind == 'remove':
            del holder[key]
            return spoilt, '.'.join(names), kind
        if kind == 'value':
            holder[key] = rng.choice(
                [None, True, -1, 0, 1.5, 'x', '', [], {}, [1, 'a'], {'a': 1}, {'type': 'x'}, 10**9]
            )
            return spoilt, '.'.join(names), kind


# Parts of a config with names that a user chooses.
FREE = ('custom_keys', 'data_prefix', 'meta', 'env_variables', 'filename')
LINES = [
    'embed images m.pth o.npz --batch-size 2 --device cpu', 'search images m.pth water --top 3',
    'zero-shot images m.pth', 'report images m.pth --out page.html --max-images 9', 'figures images m.pth out --seed 1',
    'convert m.pth o.pth --to timm',
    'pretrain images out --epochs 2 --model.masking.mask_ratio 0.5', 'pretrain images out --arch.embed_dims 48',
    'heat-maps images m.pth out --texts water', 'export-onnx m.pth o.onnx', 'train config.py --cfg-options a.b=3 --amp',
    'test config.py m.pth --out o.pkl', 'train config.py --train_cfg.max_epochs 3 --resume',
]  # fmt: skip
ODD_WORDS = [
    '', '-1', '0', '1e9', 'nan', 'gpu', '--', '-', '--x', '--a.b', '=', '--=', '--a.b=', '[', '{', 'dict(', 'a=b', '\0',
    'é',
    '--help', '*', '$HOME', '--out', '--texts', '--cfg-options', '0.5', '--batch-size', '--arch', '{}',
]  # fmt: skip


def spoil_line(rng: random.Random) -> list[str]:
    """The words of a command of which one to three are replaced, misspelt, moved, doubled, added or left out."""
    words = rng.choice(LINES).split()
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(words))
        kind = rng.choice(['replace', 'misspell', 'move', 'double', 'add', 'remove'])
        if kind == 'replace':
            words[place] = rng.choice(ODD_WORDS)
        elif kind == 'misspell' and words[place]:
            words[place] = misspell(words[place], rng)
        elif kind == 'move':
            words.insert(rng.randrange(len(words)), words.pop(place))
        elif kind == 'double':
            words.insert(place, words[place])
        elif kind == 'add':
            words.insert(place, rng.choice(ODD_WORDS))
        elif len(words) > 1:
            del words[place]
    return words
