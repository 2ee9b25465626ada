"""Checkpoint files are read as data: what loads, what is refused, and MMEngine's own loading."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import uuid
from pathlib import Path

import mmengine.runner.checkpoint
import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from mmpretrain.models import VisionTransformer
from timm.models import VisionTransformer as TimmViT
from torch.utils.data import Dataset

from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file, save_checkpoint_file
from mmmilan.errors import InputError
from processes import exit_code

WEIGHTS = {'a.weight': torch.arange(6.0).view(2, 3), 'a.bias': torch.zeros(2, dtype=torch.bfloat16)}


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def save_hostile(path: Path, proof: Path, kind: str) -> None:
    checkpoint = {'meta': Hostile(proof), 'state_dict': WEIGHTS}
    if kind == 'pickle':
        path.write_bytes(pickle.dumps(checkpoint))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=kind == 'zip')


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'pickle'])
def test_hostile_pickle_is_refused_by_name_and_has_not_run(tmp_path, kind):
    path, proof = tmp_path / 'weights.pth', tmp_path / 'proof'
    save_hostile(path, proof, kind)
    with pytest.raises(InputError, match=r'weights\.pth is refused: reading it would call .*mkdir'):
        load_checkpoint_file(path)
    assert not proof.exists()


def test_opting_in_to_pickles_runs_them(tmp_path):
    """The hostile file works, so the test above can fail."""
    path, proof = tmp_path / 'weights.pth', tmp_path / 'proof'
    save_hostile(path, proof, 'zip')
    assert set(load_checkpoint_file(path, allow_pickle=True)) == {'state_dict'}  # a meta that is no dict is left out
    assert proof.exists()


def test_getattr_is_not_a_way_around(tmp_path):
    """MMEngine's checkpoints need ``getattr``; it is allowed for the statistics of HistoryBuffer only."""

    class Reach:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    torch.save({'state_dict': WEIGHTS, 'x': Reach()}, tmp_path / 'weights.pth')
    with pytest.raises(InputError, match='weights.pth is refused.*getattr'):
        load_checkpoint_file(tmp_path / 'weights.pth')


@pytest.mark.parametrize('zipped', [True, False])
def test_usual_content_of_checkpoints_loads(tmp_path, zipped):
    history = HistoryBuffer()
    history.update(1.5)
    history.update(2.5, 3)
    checkpoint = {
        'state_dict': WEIGHTS,
        'message_hub': {'log_scalars': {'train/loss': history}},
        'optimizer': {'state': {0: {'step': torch.tensor(3.0)}}, 'param_groups': [{'lr': np.float64(0.1)}]},
        'meta': {'palette': np.arange(6, dtype=np.uint8).reshape(2, 3), 'seed': np.int64(3), 'classes': ['a', 'b']},
        'args': argparse.Namespace(lr=0.1, model='mae_vit_base_patch16'),
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / 'epoch_1.pth', _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint_file(tmp_path / 'epoch_1.pth')
    assert loaded['message_hub']['log_scalars']['train/loss'].mean() == history.mean() == 1.0
    assert loaded['message_hub']['log_scalars']['train/loss'].statistics('max') == 2.5
    assert loaded['optimizer']['param_groups'][0]['lr'] == 0.1
    np.testing.assert_array_equal(loaded['meta']['palette'], checkpoint['meta']['palette'])
    assert (loaded['meta']['seed'], loaded['args'].lr) == (3, 0.1)
    assert all(torch.equal(loaded['state_dict'][key], WEIGHTS[key]) for key in WEIGHTS)


def test_names_of_numpy_1(tmp_path):
    """Checkpoints of 2022 name numpy.core; numpy 2 has renamed it to numpy._core."""
    torch.save(
        {'state_dict': WEIGHTS, 'seed': np.float64(2.5)}, tmp_path / 'new.pth', _use_new_zipfile_serialization=False
    )
    content = (tmp_path / 'new.pth').read_bytes()
    assert content.count(b'numpy._core.multiarray') == 1
    (tmp_path / 'old.pth').write_bytes(content.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    assert load_checkpoint_file(tmp_path / 'old.pth')['seed'] == 2.5


def test_damaged_files_and_other_files_are_refused(tmp_path):
    save_checkpoint_file({'state_dict': {'a': torch.zeros(5000)}}, tmp_path / 'whole.pth')
    save_checkpoint_file({'state_dict': {'a': torch.zeros(5000)}}, tmp_path / 'whole.safetensors')
    for name in ('whole.pth', 'whole.safetensors'):
        content = (tmp_path / name).read_bytes()
        for size in (len(content) // 2, len(content) - 100):
            (tmp_path / f'cut_{name}').write_bytes(content[:size])
            with pytest.raises(InputError, match=f'cut_{name} is incomplete or damaged'):
                load_checkpoint_file(tmp_path / f'cut_{name}')
    for content in (b'', b'<!DOCTYPE html><html>', b'version https://git-lfs.github.com/spec/v1'):
        (tmp_path / 'page.pth').write_bytes(content)
        with pytest.raises(InputError, match='page.pth is neither a PyTorch nor a safetensors file'):
            load_checkpoint_file(tmp_path / 'page.pth')
    with pytest.raises(InputError, match='none.pth is not a file'):
        load_checkpoint_file(tmp_path / 'none.pth')
    torch.save(torch.zeros(3), tmp_path / 'tensor.pth')
    with pytest.raises(InputError, match='tensor.pth holds a Tensor'):
        load_checkpoint_file(tmp_path / 'tensor.pth')


@pytest.mark.parametrize('name', ['weights.pth', 'weights.safetensors'])
def test_saved_files_load_bit_identical(tmp_path, name):
    weights = {**WEIGHTS, 'view': torch.arange(12.0).view(3, 4).T, 'count': torch.tensor(7)}
    save_checkpoint_file({'state_dict': weights, 'meta': {'classes': ['cat', 'dog']}}, tmp_path / name)
    loaded = load_checkpoint_file(tmp_path / name)
    assert loaded['meta'] == {'classes': ['cat', 'dog']}
    assert set(get_state_dict(loaded)) == set(weights)
    for key, value in weights.items():
        assert loaded['state_dict'][key].dtype == value.dtype
        assert torch.equal(loaded['state_dict'][key], value)
    assert os.listdir(tmp_path) == [name]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'weights.pth'
    save_checkpoint_file({'state_dict': WEIGHTS}, path)
    before = path.read_bytes()

    def fill_the_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # stands for a full disk
        for each in (path, path.with_suffix('.safetensors')):
            with pytest.raises(InputError, match=f'^{each} was not written'):
                save_checkpoint_file({'state_dict': {'a': torch.zeros(100_000)}}, each)

    assert exit_code(fill_the_disk) == 0
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['weights.pth']
    with pytest.raises(InputError, match='weights.npz ends in neither'):
        save_checkpoint_file({'state_dict': WEIGHTS}, tmp_path / 'weights.npz')


class Numbers(Dataset):
    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3,), float(index))


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, *inputs, mode):
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


def runner(work_dir: Path, epochs: int, **kwargs) -> Runner:
    torch.manual_seed(0)
    sampler = DefaultSampler(Numbers(), shuffle=False)
    return Runner(
        Model(),
        str(work_dir),
        dict(dataset=Numbers(), batch_size=4, sampler=sampler),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=4),
        experiment_name=str(uuid.uuid4()),  # else two runners of one process share a message hub
        **kwargs,
    )


def test_mmengine_resumes_its_own_checkpoints_through_the_safe_loader(tmp_path, safe_mmengine, monkeypatch):
    monkeypatch.setattr(torch, 'load', None)
    whole = runner(tmp_path / 'whole', 4)
    whole.train()
    rest = runner(tmp_path / 'rest', 4, load_from=str(tmp_path / 'whole' / 'epoch_2.pth'), resume=True)
    rest.train()
    assert torch.equal(whole.model.layer.weight, rest.model.layer.weight)
    moments = [each.optim_wrapper.optimizer.state_dict()['state'][0]['exp_avg'] for each in (whole, rest)]
    assert torch.equal(*moments)
    assert len(rest.message_hub.get_scalar('train/loss').data[0]) == 8  # half of them from the checkpoint


@pytest.mark.parametrize('resume', [False, True])
def test_mmengine_refuses_what_would_run_code(tmp_path, safe_mmengine, resume):
    path, proof = tmp_path / 'weights.pth', tmp_path / 'proof'
    save_hostile(path, proof, 'zip')
    with pytest.raises(InputError, match='is refused: reading it would call .*mkdir'):
        runner(tmp_path / 'run', 1, load_from=str(path), resume=resume).train()
    assert not proof.exists()


def test_mmengine_alone_falls_back_to_the_whole_pickle(tmp_path):
    """The reason for the safe loader. If this test fails, MMEngine has become safe itself."""
    path, proof = tmp_path / 'weights.pth', tmp_path / 'proof'
    save_hostile(path, proof, 'zip')
    mmengine.runner.checkpoint.load_from_local(str(path), 'cpu')
    assert proof.exists()


@pytest.mark.parametrize(
    'name, message',
    [
        *((f'{name}://a.pth', f'safely from a {name}:// address') for name in ('s3', 'petrel', 'pavi', 'mmcls')),
        ('torchvision://none', 'torchvision://none is unknown to MMEngine'),
        ('openmmlab://none', 'openmmlab://none is unknown to MMEngine'),
        ('no_such_model', 'no_such_model is neither a file nor a URL nor a model of the zoo'),
    ],
)
def test_mmengine_refuses_sources_without_checks(safe_mmengine, name, message):
    with pytest.raises(InputError, match=message):
        CheckpointLoader.load_checkpoint(name)


def vit(checkpoint: Path, **kwargs) -> VisionTransformer:
    arch = dict(embed_dims=48, num_layers=1, num_heads=3, feedforward_channels=192)
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint), **kwargs)
    return VisionTransformer(arch, img_size=64, patch_size=8, out_type='avg_featmap', init_cfg=init_cfg)


@pytest.mark.parametrize('prefix', [None, 'backbone', 'backbone.'])
def test_pretrained_init_takes_any_layout(tmp_path, safe_mmengine, prefix, capsys):
    source = TimmViT(32, 8, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    save_checkpoint_file({'model': source.state_dict()}, tmp_path / 'timm.pth')
    MMLogger.get_instance(str(uuid.uuid4()))
    ours = vit(tmp_path / 'timm.pth', prefix=prefix)
    ours.init_weights()
    assert torch.equal(ours.layers[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert torch.equal(ours.ln1.bias, source.norm.bias)
    assert ours.pos_embed.shape == (1, 65, 48) and torch.equal(ours.pos_embed[:, 0], source.pos_embed[:, 0])
    said = capsys.readouterr().out
    assert 'VisionTransformer: 18 of 20 weights loaded from' in said
    assert 'newly initialised: ln2.bias, ln2.weight; not used: none.' in said


def test_pretrained_init_refuses_unfit_files(tmp_path, safe_mmengine):
    save_checkpoint_file({'state_dict': {'layer.weight': torch.zeros(1)}}, tmp_path / 'other.pth')
    with pytest.raises(InputError, match="other.pth holds no weight of VisionTransformer under 'backbone.'.* layer"):
        vit(tmp_path / 'other.pth').init_weights()
    source = TimmViT(32, 16, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    save_checkpoint_file(source.state_dict(), tmp_path / 'timm.safetensors')
    with pytest.raises(InputError, match="under 'encoder.' \\(its keys begin with backbone\\)"):
        vit(tmp_path / 'timm.safetensors', prefix='encoder.').init_weights()
    with pytest.raises(InputError, match='timm.safetensors does not fit.*size mismatch for patch_embed'):
        vit(tmp_path / 'timm.safetensors').init_weights()
