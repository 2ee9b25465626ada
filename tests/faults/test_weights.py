"""Hundreds of spoilt and hostile files of weights, through every loader: a sentence, and no code."""

from __future__ import annotations

import os
import pickle
import random
import struct
import time
import warnings
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
from mmpretrain.models import VisionTransformer

from mmmilan.checkpoints.io import check_values, get_state_dict, load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.layouts import convert
from mmmilan.checkpoints.loading import load_weights
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mutations import spoil_bytes, spoil_pickle, spoil_values, write
from small_runs import Model, runner

ARCH = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32)


def encoder() -> VisionTransformer:
    return VisionTransformer(ARCH, img_size=32, patch_size=16, out_type='avg_featmap')


def honest() -> dict:
    """A checkpoint with all that stands in one of MMEngine."""
    model = encoder()
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return {
        'meta': {'epoch': 1, 'iter': 2, 'seed': 0, 'cfg': 'a = 1', 'dataset_meta': {'palette': np.arange(3)}},
        'state_dict': {f'backbone.{key}': value for key, value in model.state_dict().items()},
        'message_hub': {'log_scalars': {'train/loss': history}, 'runtime_info': {'iter': 2}, 'resumed_keys': {}},
        'optimizer': optimizer.state_dict(),
        'param_schedulers': [{'last_step': 2, '_last_value': [0.1]}],
    }


def as_encoder(path: Path) -> None:
    load_weights(encoder(), load_checkpoint_file(path), str(path))


def as_init_cfg(path: Path) -> None:
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    VisionTransformer(ARCH, img_size=32, patch_size=16, out_type='avg_featmap', init_cfg=init_cfg).init_weights()


def as_converter(path: Path) -> None:
    weights = get_state_dict(load_checkpoint_file(path), str(path))
    try:
        check_values(convert(weights, 'timm', encoder_only=True), 'its weights')
    except InputError as error:
        raise InputError(f'{path}: {error}') from error


LOADERS = [as_encoder, as_init_cfg, as_converter]


def survives(load: Callable, path: Path) -> str | None:
    """The sentence with which a file is refused, or None where it loads; anything else fails."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try:
            load(path)
            message = None
        except InputError as error:
            message = str(error)
            assert path.name in message and '\n' not in message, message
    assert time.perf_counter() - started < 5
    return message


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_flipped_bits_are_found(tmp_path, ending):
    """All of them that change a weight. The stream of PyTorch before 1.6 has no checksum."""
    path, rng = tmp_path / f'weights.{ending}', random.Random(0)
    checkpoint = honest()
    if ending == 'safetensors':
        save_checkpoint_file(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    content = bytearray(path.read_bytes())
    refused = 0
    for _ in range(100):
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        content[place] ^= bit
        write(path, bytes(content))
        content[place] ^= bit
        try:
            loaded = get_state_dict(load_checkpoint_file(path))
            same = all(torch.equal(loaded[key], value) for key, value in checkpoint['state_dict'].items())
            assert same  # the flip was in the padding
        except InputError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize('ending', ['pth', 'legacy', 'safetensors'])
@pytest.mark.parametrize('load', LOADERS)
def test_spoilt_bytes(tmp_path, safe_mmengine, load, ending):
    path, rng = tmp_path / f'weights.{ending}', random.Random(1)
    if ending == 'safetensors':
        save_checkpoint_file(honest(), path)
    else:
        torch.save(honest(), path, _use_new_zipfile_serialization=ending == 'pth')
    content = path.read_bytes()
    messages = [survives(load, write(path, spoil_bytes(content, rng))) for _ in range(40)]
    assert sum(message is not None for message in messages) > (12 if ending == 'legacy' else 30)


def test_spoilt_pickles_with_sound_checksums(tmp_path):
    path, rng = tmp_path / 'weights.pth', random.Random(2)
    torch.save(honest(), path)
    content = path.read_bytes()
    messages = [survives(as_encoder, write(path, spoil_pickle(content, rng))) for _ in range(120)]
    assert sum(message is not None for message in messages) > 60


@pytest.mark.parametrize('load', LOADERS)
def test_spoilt_values(tmp_path, safe_mmengine, load):
    path, rng, checkpoint = tmp_path / 'weights.pth', random.Random(3), honest()
    only_weights = {'state_dict': checkpoint['state_dict'], 'meta': checkpoint['meta']}
    messages = [survives(load, write(path, spoil_values(only_weights, rng))) for _ in range(100)]
    assert sum(message is not None for message in messages) > 40


@pytest.mark.parametrize('with_model', [False, True])
def test_teachers(tmp_path, clip_file, with_model):
    """A teacher's file in OpenAI's layout, and in timm's where the model is named."""
    config = dict(type='mmmilan.OpenCLIPTeacher')
    weights = torch.load(clip_file)
    if with_model:
        config = dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224.augreg_in21k')
    path, rng = tmp_path / 'teacher.pt', random.Random(4)

    def load(path):
        MODELS.build(config | dict(pretrained=str(path)))

    torch.save(weights, path)
    content, refused = path.read_bytes(), 0
    for turn in range(12 if with_model else 60):
        spoilt = spoil_values(weights, rng) if turn % 2 else spoil_bytes(content, rng)
        refused += survives(load, write(path, spoilt)) is not None
    assert refused > (10 if with_model else 40)


# -- code


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
    """Their size can be forged, and they would then read the memory that lies behind them."""
    for value in (np.array(['a']), np.array([b'a']), np.str_('a'), np.array([None])):
        torch.save({'state_dict': {}, 'meta': {'a': value}}, tmp_path / 'weights.pth')
        assert 'is refused' in survives(load_checkpoint_file, tmp_path / 'weights.pth')


def test_state_is_not_set_on_what_it_does_not_belong_to(tmp_path):
    """BUILD could give a class or a function other attributes."""
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
    torch.jit.load(path)  # what shows that this test tests something
    assert proof.exists()


def test_weights_of_torchscript(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4)).half()
    torch.jit.save(torch.jit.script(module), tmp_path / 'script.pt')
    loaded = load_checkpoint_file(tmp_path / 'script.pt')
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
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

    import io

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


# -- resuming


def test_spoilt_training_states(tmp_path, safe_mmengine):
    """Resumed: it goes on, or says what is wrong; a spoilt state of a fused optimizer crashes the process."""
    runner(tmp_path / 'first', epochs=1).train()
    checkpoint = torch.load(tmp_path / 'first/epoch_1.pth', weights_only=False)
    path, rng, refused = tmp_path / 'spoilt.pth', random.Random(5), 0

    def resume(path):
        runner(tmp_path / 'work', load_from=str(path), resume=True).train()

    resume(tmp_path / 'first/epoch_1.pth')
    for turn in range(40):
        spoilt = spoil_values(checkpoint, rng)
        if turn % 2:
            spoilt = checkpoint | {'optimizer': spoil_values(checkpoint['optimizer'], rng)}
        write(path, spoilt)
        try:
            resume(path)
        except InputError as error:
            assert 'spoilt.pth' in str(error) and '\n' not in str(error)
            refused += 1
    assert refused > 15


def test_weights_alone_are_not_resumed(tmp_path, safe_mmengine):
    torch.save({'state_dict': Model().state_dict()}, tmp_path / 'weights.pth')
    with pytest.raises(InputError, match='weights.pth holds weights alone .*load_from=FILE'):
        runner(tmp_path / 'work', load_from=str(tmp_path / 'weights.pth'), resume=True).train()


def test_names_of_files_in_a_checkpoint_do_not_lead_out_of_the_work_dir(tmp_path, safe_mmengine):
    """MMEngine deletes what they name."""
    first = runner(tmp_path / 'first', epochs=1)
    first.message_hub.update_info('best_ckpt', str(tmp_path / 'precious.pth'))
    first.message_hub.update_info('keep_ckpt_ids', ['/../../precious', 1])
    first.train()
    second = runner(tmp_path / 'work', load_from=str(tmp_path / 'first/epoch_1.pth'), resume=True)
    second.train()
    assert second.message_hub.get_info('best_ckpt') == str(tmp_path / 'work/precious.pth')
    assert '/../../precious' not in second.message_hub.get_info('keep_ckpt_ids')
