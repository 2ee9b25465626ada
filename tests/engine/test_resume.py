"""A run that was killed and resumed ends with the weights of an uninterrupted one, bit by bit."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import timm
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from helpers import assert_identical, load_trusted, read_scalars
from processes import exit_code


@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 8:  # in the second epoch of 6 steps
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_and_resumed(tiny_config, run_tool, tmp_path):
    persistent = {'train_dataloader.persistent_workers': True}
    kill = {'default_hooks.kill': dict(type='KillHook')}
    assert exit_code(run_tool, 'train.py', tiny_config(persistent), '--work-dir', tmp_path / 'uninterrupted') == 0
    expected = load_trusted(tmp_path / 'uninterrupted/epoch_2.pth')
    killed = exit_code(run_tool, 'train.py', tiny_config(persistent | kill), '--work-dir', tmp_path / 'killed')
    assert killed == -signal.SIGKILL
    assert (tmp_path / 'killed/last_checkpoint').read_text().endswith('epoch_1.pth')

    shutil.copytree(tmp_path / 'killed', tmp_path / 'other')
    run_tool('train.py', tiny_config(), '--work-dir', tmp_path / 'killed', '--resume')
    assert_identical(load_trusted(tmp_path / 'killed/epoch_2.pth'), expected)

    # samples do not depend on the worker that reads them; the checkpoint is named this time
    config = tiny_config({'train_dataloader.num_workers': 1})
    run_tool('train.py', config, '--work-dir', tmp_path / 'other', '--resume', tmp_path / 'other/epoch_1.pth')
    assert_identical(load_trusted(tmp_path / 'other/epoch_2.pth'), expected)
    with pytest.raises(AssertionError):
        assert_identical(load_trusted(tmp_path / 'other/epoch_1.pth'), expected)


def test_steps_and_epochs_differ(tiny_config, run_tool, tmp_path):
    """The runs above do use randomness: with a learning rate of 0, no two losses are the same."""
    run_tool('train.py', tiny_config({'optim_wrapper.optimizer.lr': 0.0, 'optim_wrapper.type': 'OptimWrapper'}))
    losses = [record['loss'] for record in read_scalars(tmp_path / 'work')]
    assert len(losses) == len(set(losses)) == 12


PROMPTS_ONLY = {'model.masks_per_image': 2, 'model.neck.self_attention': False, 'model.neck.predict_ratio': 0.4}
ALIGNMENT = {
    'model.backbone.out_indices': [0, 1],
    'model.neck': dict(
        _delete_=True, type='mmmilan.LayerMixture', embed_dim=48, num_layers=2, num_targets=1, predict_feature_dim=128
    ),
    'model.head.type': 'mmmilan.LayerAlignment',
    'model.head.num_layers': 1,
}


@pytest.fixture
def pooling_teacher(tmp_path):
    """A teacher without class token, with a pooling query and a register: timm's smallest, random weights in a file."""
    vit = timm.create_model('test_vit3', num_classes=0, img_size=64)
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    teacher = dict(_delete_=True, type='mmmilan.TimmTeacher', model='test_vit3', pretrained=str(tmp_path / 'vit.pth'))
    teacher |= dict(input_size=64, teacher_mean_std='own')
    return {'model.head.teacher': teacher, 'model.neck.predict_feature_dim': 96}


@pytest.fixture
def cached_teacher(tiny_config, run_tool, tmp_path):
    """The config's teacher from a cache of two epochs."""
    cache = str(tmp_path / 'cache')
    run_tool('cache_targets.py', tiny_config({'train_dataloader.num_workers': 0}), cache, '--epochs', 2)
    return {
        'train_dataloader.dataset.type': 'mmmilan.CachedTargets',
        'train_dataloader.dataset.cache': cache,
        'model.head.teacher': dict(_delete_=True, type='mmmilan.CachedTeacher', cache=cache),
    }


@pytest.fixture
def prompted(maskclip_file):
    """Texts, not attention, decide on the masks."""
    return {
        'model.head.teacher.importance': dict(texts=['a ship', 'rust']),
        'model.head.teacher.pretrained': maskclip_file,
    }


@pytest.fixture
def several_targets(clip_file):
    """Features, of which the class token counts twice, and pixels."""
    teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    targets = [dict(type='mmmilan.CLIPTarget', cls_token=2.0, teacher=teacher)]
    targets += [dict(type='mmmilan.PixelTarget', norm_pix=True)]
    head = dict(_delete_=True, type='mmmilan.SumTarget', targets=targets, weights=[1.0, 0.2])
    return {'model.head': head, 'model.neck.predict_feature_dim': 24 + 768}


OTHER_PARTS = [PROMPTS_ONLY, ALIGNMENT, 'prompted', 'several_targets', 'cached_teacher', 'pooling_teacher']


@pytest.mark.parametrize('options', OTHER_PARTS)
def test_resumed_with_other_parts(options, tiny_config, run_tool, tmp_path, request):
    """One epoch and a resumed second one are two epochs in one run."""
    options = request.getfixturevalue(options) if isinstance(options, str) else options
    config = tiny_config({'train_dataloader.num_workers': 0} | options)
    run_tool('train.py', config, '--work-dir', tmp_path / 'whole')
    expected = load_trusted(tmp_path / 'whole/epoch_2.pth')
    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'whole/epoch_1.pth', tmp_path / 'resumed')
    run_tool('train.py', config, '--work-dir', tmp_path / 'resumed', '--resume', tmp_path / 'resumed/epoch_1.pth')
    assert_identical(load_trusted(tmp_path / 'resumed/epoch_2.pth'), expected)
    if 'model.masks_per_image' in options:
        record = read_scalars(tmp_path / 'resumed')[-1]
        assert record['masked_views_per_s'] == pytest.approx(2 * record['images_per_s'])
