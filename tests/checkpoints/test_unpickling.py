"""Hostile files of weights: their code is not run, and sizes that they declare are checked."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  has the operator write_file
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmmilan.checkpoints.io import load_checkpoint_file, save_checkpoint_file
from weight_files import as_encoder, honest, survives


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(proof: Path) -> list:
    code = f'import os; os.mkdir({str(proof)!r})'
    return [
        Call(os.mkdir, str(proof)), Call(os.system, f'mkdir {proof}'), Call(eval, code), Call(exec, code),
        Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(proof)))), Call(getattr, HistoryBuffer, '__init__'),
        Call(print, 'hi'),
        Call(torch.load, str(proof)), Call(Config.fromstring, code, '.py'), Call(map, os.mkdir, [str(proof)]),
        Call(np.dtype, 'S8'), Call(np.dtype, 'U8'), Call(np.dtype, 'O'), Call(np.load, str(proof)),
        Call(open, str(proof), 'w'),
    ]  # fmt: skip


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('number', range(15))
def test_calls_are_refused(tmp_path, number, zipped):
    proof = tmp_path / 'proof'
    checkpoint = honest()
    rng = random.Random(number)
    part = checkpoint[rng.choice(list(checkpoint))]
    if isinstance(part, dict):
        part['evil'] = hostile(proof)[number]
    else:
        part.append(hostile(proof)[number])
    path = tmp_path / 'weights.pth'
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    assert 'is refused: reading it would call' in survives(as_encoder, path)
    assert not proof.exists()


def test_strings_of_numpy_are_refused(tmp_path):
    """With a forged size they would read memory behind their own."""
    for value in (np.array(['a']), np.array([b'a']), np.str_('a'), np.array([None])):
        torch.save({'state_dict': {}, 'meta': {'a': value}}, tmp_path / 'weights.pth')
        assert 'is refused' in survives(load_checkpoint_file, tmp_path / 'weights.pth')


def test_attributes_of_classes_and_functions_are_not_set(tmp_path):
    """The opcode BUILD could change them."""
    for name in (b'mmengine.logging.history_buffer\nHistoryBuffer', b'torch._utils\n_rebuild_tensor_v2'):
        path = tmp_path / 'weights.pth'
        path.write_bytes(b'\x80\x02c' + name + b'\nN}X\x01\x00\x00\x00aK\x01s\x86b.')
        assert 'is refused' in survives(load_checkpoint_file, path)
    assert not hasattr(HistoryBuffer, 'a')


class Script(torch.nn.Module):
    """A TorchScript module that writes a file when it is loaded by ``torch.jit.load``."""

    def __init__(self, proof: str) -> None:
        super().__init__()
        self.proof = proof
        self.weight = torch.nn.Parameter(torch.arange(3.0))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return self.proof, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.proof, self.weight, self.training = state
        torch.ops.image.write_file(self.proof, torch.zeros(4, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_torchscript_runs_nothing(tmp_path):
    proof, path = tmp_path / 'proof', tmp_path / 'script.pt'
    torch.jit.save(torch.jit.script(Script(str(proof))), path)
    survives(load_checkpoint_file, path)
    assert not proof.exists()
    torch.jit.load(path)  # PyTorch's loader does run it
    assert proof.exists()


def test_weights_of_torchscript(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).half()
    torch.jit.save(torch.jit.script(module), tmp_path / 'script.pt')
    loaded = load_checkpoint_file(tmp_path / 'script.pt')
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize('ending', ['pth', 'safetensors', 'PTH', 'SAFETENSORS'])
def test_config_in_meta_is_not_run(tmp_path, safe_mmengine, ending):
    proof, checkpoint = tmp_path / 'proof', honest()
    checkpoint['meta'] = {'config': f'import os\nos.mkdir({str(proof)!r})', 'epoch': 1, 'iter': 2}
    save_checkpoint_file(checkpoint, tmp_path / f'weights.{ending}')
    assert 'config' not in CheckpointLoader.load_checkpoint(str(tmp_path / f'weights.{ending}'))['meta']


# -- sizes


def archive(path: Path, pickled: bytes, storages: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('archive/data.pkl', pickled)
        for name, content in storages.items():
            file.writestr(f'archive/data/{name}', content)
    return path


def forged(size: tuple, stride: tuple, count: int, offset: int = 0) -> bytes:
    """A pickle of one tensor that declares these sizes."""

    class Forged(pickle._Pickler):
        def persistent_id(self, value):
            return ('storage', torch.FloatStorage, '0', 'cpu', count) if value == 'memory' else None

    file = io.BytesIO()
    Forged(file, 2).dump({'a': Call(torch._utils._rebuild_tensor_v2, 'memory', offset, size, stride, False, {})})
    return file.getvalue()


@pytest.mark.parametrize(
    'size, stride, count, offset',
    [
        ((10**12,), (1,), 4, 0),
        ((4,), (10**9,), 4, 0),
        ((2, 2), (2, 1), 4, 1),
        ((4,), (1,), 10**13, 0),
        ((10**6, 10**6), (0, 0), 4, 0),
        ((-1,), (1,), 4, 0),
        ((4,), (-1,), 4, 0),
        ((4,), (1,), 4, -1),
        ((1,) * 1000, (1,) * 1000, 4, 0),
        ((10**30,), (1,), 4, 0),
    ],
)
def test_sizes_beyond_the_file(tmp_path, size, stride, count, offset):
    path = archive(tmp_path / 'weights.pth', forged(size, stride, count, offset), {'0': bytes(16)})
    assert 'incomplete or damaged' in survives(load_checkpoint_file, path)


def test_many_layers_of_one_storage(tmp_path):
    weight = torch.zeros(64, 64)
    path = tmp_path / 'weights.pth'
    torch.save({f'transformer.resblocks.{i}.weight': weight for i in range(1000)}, path)
    assert 'more values than the file can hold' in survives(load_checkpoint_file, path)


@pytest.mark.parametrize('kind', ['endless', 'laughs', 'deep', 'memo', 'bytes'])
def test_lists_without_end(tmp_path, kind):
    endless: list = []
    endless.append(endless)
    laughs: list = ['ha']
    for _ in range(60):
        laughs = [laughs, laughs]
    content = {
        'endless': pickle.dumps({'a': endless}, 2),
        'laughs': pickle.dumps({'a': laughs}, 2),
        'deep': b'\x80\x02}X\x01\x00\x00\x00a' + b']' * 200_000 + b'a' * 199_999 + b's.',
        'memo': b'\x80\x02}r\xff\xff\xff\xffX\x01\x00\x00\x00aNs.',
        'bytes': b'\x80\x05}X\x01\x00\x00\x00a\x96' + struct.pack('<Q', 1 << 40) + b's.',
    }[kind]
    message = survives(as_encoder, archive(tmp_path / 'weights.pth', content, {}))
    assert message is not None
