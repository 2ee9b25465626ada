"""MILAN on one's own images, in one line."""

from __future__ import annotations

import json
import tarfile

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import mmmilan
from helpers import assert_identical, load_trusted
from mmmilan import cli
from mmmilan.api.pretrain import teacher_config
from mmmilan.checkpoints.config import own_config
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.errors import InputError

ARCH = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96)
QUICK = {
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'test_dataloader.num_workers': 0,
}


@pytest.fixture
def quick(clip_file):
    """The arguments of a run of seconds."""
    return dict(arch=ARCH, teacher=clip_file, img_size=64, batch_size=8, epochs=2, **QUICK)


def scores_of(folder) -> list[dict]:
    lines = [line for file in sorted(folder.glob('*/vis_data/scalars.json')) for line in file.read_text().splitlines()]
    return [row for row in map(json.loads, lines) if 'eval/epoch' in row]


def test_from_a_folder_to_an_encoder(image_folder, quick, tmp_path, run_tool):
    weights = mmmilan.pretrain(image_folder, tmp_path / 'a', **quick)
    assert weights == tmp_path / 'a/milan.pth'
    scores = scores_of(tmp_path / 'a')
    assert [row['eval/epoch'] for row in scores] == [0, 1, 2]
    for row in scores:  # the three folders name classes
        assert 0 <= row['eval/knn'] <= 100 and 1 <= row['eval/rankme'] <= 24
        assert -1 <= row['eval/cosine_patches'] <= 1 and 0 < row['eval/time_share'] <= 1
    assert scores[-1]['eval/cosine_patches'] > scores[0]['eval/cosine_patches']
    assert mmmilan.FeatureExtractor(weights)(sorted(map(str, image_folder.glob('*/*/*.jpg')))[:2]).shape == (2, 48)

    config = own_config(weights)
    assert config.model.neck.embed_dim == config.model.neck.decoder_embed_dim == 48
    assert config.model.neck.predict_feature_dim == 24 and config.model.neck.num_patches == 16

    # the config that was written trains the same
    run_tool('train.py', tmp_path / 'a/config.py', '--work-dir', tmp_path / 'b')
    expected = load_trusted(tmp_path / 'a/epoch_2.pth')
    assert_identical(load_trusted(tmp_path / 'b/epoch_2.pth'), expected)
    assert expected['state_dict'].keys() == load_checkpoint_file(weights)['state_dict'].keys()


@pytest.mark.slow
def test_evaluation_leaves_training_as_it_is(image_folder, quick, tmp_path, run_tool):
    """The same weights to the bit with it, without it, and where a run with it is resumed without."""
    mmmilan.pretrain(image_folder, tmp_path / 'with', **quick)
    expected = load_trusted(tmp_path / 'with/epoch_2.pth')
    config = Config.fromfile(tmp_path / 'with/config.py')
    hooks = [hook for hook in config.custom_hooks if hook.type != 'mmmilan.OnlineEvaluationHook']
    assert len(hooks) == len(config.custom_hooks) - 1
    config.custom_hooks = hooks
    config.dump(tmp_path / f'{tmp_path.name}_without.py')
    run_tool('train.py', tmp_path / f'{tmp_path.name}_without.py', '--work-dir', tmp_path / 'without')
    assert_identical(load_trusted(tmp_path / 'without/epoch_2.pth'), expected)
    resumed = ('--work-dir', tmp_path / 'resumed', '--resume', tmp_path / 'with/epoch_1.pth')
    run_tool('train.py', tmp_path / f'{tmp_path.name}_without.py', *resumed)
    assert_identical(load_trusted(tmp_path / 'resumed/epoch_2.pth'), expected)


@pytest.mark.slow
def test_start_changes_and_resume(image_folder, quick, tmp_path):
    first = mmmilan.pretrain([image_folder / 'class0', image_folder / 'class1'], tmp_path / 'first', **quick)
    assert 'eval/knn' not in scores_of(tmp_path / 'first')[0]  # no one folder of labels
    quick['epochs'] = 1
    changes = {'optim_wrapper.optimizer.lr': 0.0, 'model': dict(masking=dict(mask_ratio=0.5))}
    second = mmmilan.pretrain(image_folder, tmp_path / 'second', start=str(first), **quick, **changes)
    assert own_config(second).model.masking.mask_ratio == 0.5
    before, after = (load_checkpoint_file(path)['state_dict']['backbone.cls_token'] for path in (first, second))
    assert torch.equal(before, after)

    (tmp_path / 'second/last_checkpoint').unlink()  # the checkpoints themselves are what counts
    with pytest.raises(InputError, match='holds a run already'):
        mmmilan.pretrain(image_folder, tmp_path / 'second', **quick)
    quick['epochs'] = 2
    mmmilan.pretrain(image_folder, tmp_path / 'second', start=str(first), resume=True, **quick, **changes)
    assert (tmp_path / 'second/epoch_2.pth').exists()
    assert [row['eval/epoch'] for row in scores_of(tmp_path / 'second')] == [0, 1, 2]


@pytest.mark.slow
def test_shards_and_flat_folders(tmp_path, quick):
    rng = np.random.default_rng(0)
    (tmp_path / 'flat').mkdir()
    with tarfile.open(tmp_path / 'shard.tar', 'w') as tar:
        for i in range(8):
            path = tmp_path / 'flat' / f'{i}.png'
            cv2.imwrite(str(path), rng.integers(0, 255, (70, 70, 3), dtype=np.uint8))
            tar.add(path, f'{i}.png')
    quick |= {'epochs': 1, 'batch_size': 16}
    weights = mmmilan.pretrain([tmp_path / 'flat', tmp_path / 'shard.tar'], tmp_path / 'run', **quick)
    assert weights.exists()
    assert len(scores_of(tmp_path / 'run')) == 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(data='nowhere'), 'nowhere does not exist'),
        (dict(data='.'), 'holds no image'),
        (dict(teacher='none.pt'), 'The teacher none.pt is neither'),
        (dict(teacher='ViT-B-16:nobody'), 'nobody'),
        (dict(teacher='ViT-Z-16:openai'), 'ViT-Z-16'),
        (dict(start='none.pth'), 'none.pth is neither a file'),
        (dict(arch='gigantic'), "arch 'gigantic' is unknown"),
        (dict(arch=dict(embed_dims=3)), 'lacks feedforward_channels'),
        (dict(img_size=100), 'not a multiple of patch_size=16'),
        (dict(batch_size=25), 'do not fill one batch of 25'),
        (dict(labelled='.'), 'no folders that name classes'),
        (dict(resume=True), 'holds no checkpoint'),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(image_folder, quick, tmp_path, monkeypatch, change, message):
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'empty')
    arguments = {'data': image_folder, **quick, **change}
    with pytest.raises(InputError, match=message) as error:
        mmmilan.pretrain(arguments.pop('data'), tmp_path / 'out', **arguments)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_teachers_by_name(tmp_path):
    (tmp_path / 'clip.pt').touch()
    assert teacher_config('ViT-B-16:openai')['pretrained'] == 'openai'
    assert teacher_config('vit_base_patch16_224.dino') == dict(
        type='mmmilan.TimmTeacher', model='vit_base_patch16_224.dino'
    )
    assert teacher_config(str(tmp_path / 'clip.pt'))['pretrained'] == str(tmp_path / 'clip.pt')


def test_command(image_folder, clip_file, tmp_path, capsys):
    changes = [argument for key, value in QUICK.items() for argument in (f'--{key}', str(value))]
    command = ['pretrain', image_folder, '--out', tmp_path / 'run', '--arch', 'tiny', '--teacher', clip_file]
    options = ['--epochs', 1, '--img-size', 64, '--model.neck.decoder_depth=1', *changes]
    cli.main([*map(str, command), *map(str, options)])
    assert capsys.readouterr().out.strip().endswith(f'{tmp_path}/run/milan.pth')
    config = own_config(tmp_path / 'run/milan.pth')
    assert config.model.backbone.arch == 'deit-tiny' and config.model.neck.decoder_depth == 1
