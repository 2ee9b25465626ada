"""MILAN on one's own images, in one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.models import VisionTransformer
from PIL import Image

import mmmilan
from helpers import assert_identical, load_trusted
from mmmilan import cli
from mmmilan.api.few_images import about_recipe, keep_repeated, repeat_crops
from mmmilan.api.finetune_encoder import encoder_in
from mmmilan.api.pretrain import reported_images
from mmmilan.api.recipe import new_config, refuse_changes
from mmmilan.building import change_config
from mmmilan.checkpoints.config import own_config
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.engine import OnlineEvaluationHook
from mmmilan.engine.config_check import check_is_not_read
from mmmilan.engine.schedule import fit_schedule
from mmmilan.errors import InputError
from mmmilan.models.targets import Target

SMALL = dict(num_layers=2, num_heads=3, feedforward_channels=96)


def scores_of(folder) -> list[dict]:
    lines = [line for file in sorted(folder.glob('*/vis_data/scalars.json')) for line in file.read_text().splitlines()]
    return [row for row in map(json.loads, lines) if 'eval/epoch' in row]


def test_from_a_folder_to_an_encoder(image_folder, quick, tmp_path, run_tool):
    weights = mmmilan.pretrain(image_folder, tmp_path / 'a', **quick)
    assert weights == tmp_path / 'a/milan.pth'
    scores = scores_of(tmp_path / 'a')
    assert [row['eval/epoch'] for row in scores] == [0, 1, 2]
    for row in scores:  # the three folders name classes
        assert all(0 <= row[f'eval/{name}'] <= 100 for name in ('knn', 'knn_mean', 'probe_10', 'probe_10_mean'))
        assert 1 <= row['eval/rankme'] <= 24
        assert -1 <= row['eval/cosine_patches'] <= 1 and 0 < row['eval/time_share'] <= 1
    assert scores[-1]['eval/cosine_patches'] > scores[0]['eval/cosine_patches']
    assert mmmilan.FeatureExtractor(weights)(sorted(map(str, image_folder.glob('*/*/*.jpg')))[:2]).shape == (2, 48)
    page = (tmp_path / 'a/report.html').read_text()
    assert re.search('class="verdict">Pretraining .*random weights', page) and 'weighs in the loss as 8 patches' in page
    assert f'<code>mmmilan pretrain {image_folder} {tmp_path}/a --arch ' in page
    assert f'<code>mmmilan report {image_folder} {weights} --out {tmp_path}/a/report.html</code>' in page

    config = own_config(weights)
    assert config.model.neck.embed_dim == config.model.neck.decoder_embed_dim == 48
    assert config.model.neck.predict_feature_dim == 24 and config.model.neck.num_patches == 16

    # the config that was written trains the same
    run_tool('train.py', tmp_path / 'a/config.py', '--work-dir', tmp_path / 'b')
    expected = load_trusted(tmp_path / 'a/epoch_2.pth')
    assert_identical(load_trusted(tmp_path / 'b/epoch_2.pth'), expected)
    assert expected['state_dict'].keys() == load_checkpoint_file(weights)['state_dict'].keys()


@pytest.mark.slow
def test_evaluation_leaves_training_as_it_is(image_folder, quick, no_report, tmp_path, run_tool):
    """Weights are equal to the bit with it, without it, and when a run with it is resumed without."""
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
def test_start_changes_and_resume(image_folder, quick, no_report, tmp_path):
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


@pytest.fixture
def no_report(monkeypatch):
    """Runs end without their page, which takes most of their time."""
    monkeypatch.setattr('mmmilan.api.pretrain.write_report', lambda *args, **kwargs: None)


def stop_after_one_epoch(run: Path) -> None:
    """Leave a run as if it had been stopped after its first epoch."""
    for path in [*run.glob('epoch_*.pth'), run / 'milan.pth', run / 'last_checkpoint']:
        if path.name != 'epoch_1.pth':
            path.unlink()


@pytest.fixture
def interrupted(image_folder, quick, tmp_path):
    """A run of 2 epochs of 3 steps, of which the first is done, with a ratio of its own. Its arguments are relative."""
    shutil.copytree(image_folder, tmp_path / 'photos')
    shutil.copy(quick['teacher'], tmp_path / 'teacher.pt')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr('mmmilan.api.pretrain.write_report', lambda *args, **kwargs: None)
        arguments = {**quick, 'teacher': 'teacher.pt', 'model.masking.mask_ratio': 0.5}
        mmmilan.pretrain('photos', 'run', **arguments)
    stop_after_one_epoch(tmp_path / 'run')
    return tmp_path / 'run'


@pytest.mark.slow
def test_a_bare_resume_continues_the_run(interrupted, tmp_path, monkeypatch, capfd):
    """With its own config, from any folder, without another argument."""
    before = own_config(interrupted / 'epoch_1.pth')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    cli.main(['pretrain', '--out', '../run', '--resume'])
    assert 'with changes' not in capfd.readouterr().out
    after = own_config(interrupted / 'milan.pth')
    keys = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'randomness', 'custom_hooks')
    assert all(before[key] == after[key] for key in keys) and after.model.masking.mask_ratio == 0.5
    assert load_checkpoint_file(interrupted / 'milan.pth')['meta']['epoch'] == 2
    assert (interrupted / 'report.html').exists() and not list(Path().iterdir())
    # what was written does not depend on the folder either
    image = str(next((tmp_path / 'photos').rglob('*.jpg')))
    assert mmmilan.FeatureExtractor('../run/milan.pth')([image]).shape == (1, 48)
    assert mmmilan.get_model('../run/milan.pth', encoder_only=False).head.teacher is not None


@pytest.mark.slow
def test_a_run_that_was_stopped_before_its_first_checkpoint(interrupted, no_report, log):
    """It begins anew with its config; a folder from which only the checkpoints are gone is left as it is."""
    (interrupted / 'epoch_1.pth').unlink()
    (interrupted / 'milan.pth').touch()
    with pytest.raises(InputError, match='holds no checkpoint to resume from'):
        mmmilan.pretrain(out=interrupted, resume=True)
    (interrupted / 'milan.pth').unlink()
    cli.main(['pretrain', '--out', str(interrupted), '--resume'])
    assert log.text.count('the run begins anew with its config') == 1
    content = load_checkpoint_file(interrupted / 'milan.pth')
    assert content['meta']['epoch'] == 2 and content['meta']['training_seconds'] > 0
    config = own_config(interrupted / 'milan.pth')
    assert config.model.masking.mask_ratio == 0.5 and len(config.call.commands) == 1


def test_what_a_resumed_run_is_given_is_applied_and_said(interrupted, no_report, tmp_path, capfd):
    shutil.rmtree(tmp_path / 'photos/class2')  # 16 images remain
    arguments = ['--epochs', 3, '--batch-size', 2, '--seed', 5, '--model.masking.mask_ratio', 0.75]
    cli.main(['pretrain', str(tmp_path / 'photos'), '--out', str(interrupted), '--resume', *map(str, arguments)])
    printed = capfd.readouterr().out
    for line in (
        'model.masking.mask_ratio: 0.5 -> 0.75',
        'train_dataloader.batch_size: 8 -> 2',
        'train_cfg.max_epochs: 2 -> 3',
        'randomness.seed: 0 -> 5',
        'images: 24 -> 16',
        'optim_wrapper.optimizer.lr: 0.0024 -> 0.0021',
    ):
        assert printed.count(line) == 1, line
    config, schedule = own_config(interrupted / 'milan.pth'), fit_schedule(16, 2, 3)
    assert list(map(dict, config.param_scheduler)) == schedule.param_scheduler()
    assert load_checkpoint_file(interrupted / 'milan.pth')['meta']['iter'] == 24
    assert Config.fromfile(interrupted / 'config.py').train_cfg.max_epochs == 3
    first, second = config.call.commands
    assert first.startswith('mmmilan pretrain photos run --arch') and ' --model.masking.mask_ratio 0.5' in first
    assert second.endswith('--epochs 3 --batch-size 2 --seed 5 --model.masking.mask_ratio 0.75 --resume')


def test_a_resumed_run_reports_on_all_splits(tmp_path):
    """Its config names the parts; the report needs the whole, for its bank of training images."""

    def reported(trained: str, held_out: str, labelled: str | None = None) -> list[str]:
        evaluated = dict(data_root=str(tmp_path / labelled), with_label=True) if labelled else {}
        loaders = {
            f'{task}_dataloader': dict(dataset=dict(sources=[str(tmp_path / folder)]))
            for task, folder in (('train', trained), ('test', held_out))
        }
        hook = dict(type='mmmilan.OnlineEvaluationHook', dataset=evaluated)
        return reported_images(Config(dict(**loaders, custom_hooks=[hook])))

    for folder in ('data/train/a', 'data/train/b', 'data/val/a', 'data/val/b', 'flat', 'other/a', 'other/b'):
        (tmp_path / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / folder / '0.png'), np.zeros((4, 4, 3), np.uint8))
    assert reported('data/train', 'data/val') == [str(tmp_path / 'data')]
    assert reported('data/train', 'data/val', 'data/val') == [str(tmp_path / 'data')]
    assert reported('data/train', 'data/val', 'other') == [str(tmp_path / 'other')]
    assert reported('flat', 'flat') == [str(tmp_path / 'flat')]
    assert reported('flat', 'data/val') == [str(tmp_path / 'data/val')]
    for folder in ('maps/train/images', 'maps/train/masks', 'maps/val/images', 'maps/val/masks'):
        (tmp_path / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / folder / '0.png'), np.zeros((4, 4, 3), np.uint8))
    assert reported('maps/train', 'maps/val') == [str(tmp_path / 'maps')]


def test_a_refused_resume_writes_nothing(interrupted):
    before = {path: path.read_bytes() for path in interrupted.rglob('*') if path.is_file()}
    for change, message in (
        (dict(arch='tiny'), 'has arch=.*; leave arch out, or start a new run'),
        (dict(img_size=96), r'has img_size=\(64, 64\)'),
        (dict(patch_size=8), 'has patch_size=16'),
        (dict(start='other.pth'), 'has start=None'),
        (dict(recipe='milan'), "has recipe='few-images', which a resumed run keeps"),
        (dict(batch_size=25), 'cannot fill one batch of 25'),
        (dict(data='nowhere'), 'nowhere does not exist'),
        ({'optim_wrapper.optimizer.type': 'SGD'}, 'optim_wrapper.optimizer.betas: SGD takes no betas'),
        ({'optim_wrapper.optimizer.type': 'Adam'}, "optimizer.type='AdamW', where this one has 'Adam'"),
        ({'model.neck.decoder_num_heads': 2}, 'decoder_num_heads=1, where this one has 2'),
    ):
        with pytest.raises(InputError, match=message):
            mmmilan.pretrain(out=interrupted, resume=True, **change)
        assert before == {path: path.read_bytes() for path in interrupted.rglob('*') if path.is_file()}, change


@pytest.mark.parametrize('own', ['deit-small', 'deit-s', VisionTransformer.arch_zoo['deit-small']])
def test_a_resumed_encoder_has_several_names(own, tmp_path):
    config = Config(dict(model=dict(backbone=dict(arch=own, img_size=224, patch_size=16))))
    for arch in ('small', 'deit-s', 'dinov2-small', VisionTransformer.arch_zoo['deit-small']):
        refuse_changes(config, tmp_path, dict(arch=arch))
    for arch in ('tiny', 's', VisionTransformer.arch_zoo['deit-small'] | dict(num_heads=12)):
        with pytest.raises(InputError, match='has arch=.*; leave arch out'):
            refuse_changes(config, tmp_path, dict(arch=arch))


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


@pytest.mark.slow
def test_a_data_set_in_parts(image_folder, quick, tmp_path, capfd):
    """``train`` is for training; ``val`` is for evaluation and the report. Braces in names are no variables."""
    data, run = tmp_path / 'my{{fileDirname}}photos', tmp_path / 'run_{{$HOME:x}}'
    shutil.copytree(image_folder, data / 'train')
    for i in range(18):
        path = data / f'val/class{i % 2}/{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.random.default_rng(i).integers(0, 255, (70, 70, 3), dtype=np.uint8))
    quick['epochs'] = 1
    weights = mmmilan.pretrain(data, run, **quick)
    config = own_config(weights)
    assert config.train_dataloader.dataset.sources == [str(data / 'train')]
    assert config.custom_hooks[-1].dataset.data_root == str(data / 'val')
    assert load_checkpoint_file(weights)['meta']['iter'] == 3  # 24 images, and none of the 18
    assert 'eval/knn' in scores_of(run)[0]
    assert Config.fromfile(run / 'config.py').train_dataloader.dataset.sources == [str(data / 'train')]
    report = (run / 'report.html').read_text()
    assert f'18 images of {data}/val; the names of the folders are the 3 classes' in report

    shutil.rmtree(data / 'val/class1')  # too few for a report
    mmmilan.pretrain(data, tmp_path / 'other', **quick)
    assert not (tmp_path / 'other/report.html').exists()
    assert '/val holds 9 images; give at least 12' in capfd.readouterr().out


def test_in_a_thread_of_a_program(image_folder, quick, no_report, tmp_path, monkeypatch):
    """As a web interface would call it: Python allows no handlers of signals there."""
    with ThreadPoolExecutor() as executor:
        weights = executor.submit(mmmilan.pretrain, image_folder, tmp_path / 'run', **{**quick, 'epochs': 1}).result()
        assert weights.exists()
        monkeypatch.setattr('mmmilan.models.MILAN.loss', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            executor.submit(mmmilan.pretrain, image_folder, tmp_path / 'failing', **quick).result()


def test_in_a_daemonic_process(image_folder, quick, no_report, tmp_path, monkeypatch):
    """It can start no data workers: by default it has none."""
    monkeypatch.setitem(multiprocessing.current_process()._config, 'daemon', True)
    arguments = {name: value for name, value in quick.items() if 'num_workers' not in name} | dict(epochs=1)
    workers = {'train_dataloader.num_workers': 2, 'test_dataloader.num_workers': 2}
    with pytest.raises(InputError, match='^train_dataloader.num_workers is above 0, but this process is daemonic'):
        mmmilan.pretrain(image_folder, tmp_path / 'refused', **arguments, **workers)
    weights = mmmilan.pretrain(image_folder, tmp_path / 'run', **arguments)
    assert own_config(weights, with_data=True).train_dataloader.num_workers == 0


def test_rectangles(image_folder, quick, no_report, tmp_path):
    """Crops and grid have the proportions of ``img_size``; whole images are resized to it."""
    weights = mmmilan.pretrain(image_folder, tmp_path / 'run', **{**quick, 'img_size': (32, 64), 'epochs': 1})
    config = own_config(weights)
    assert config.model.neck.num_patches == (2, 4) and config.model.head.teacher.input_size == (32, 64)
    assert config.train_dataloader.dataset.pipeline[0].aspect_ratio_range == (1.5, 8 / 3)
    image = next(image_folder.rglob('*.jpg'))
    assert mmmilan.FeatureExtractor(weights, out_type='featmap')([str(image)]).shape == (1, 48, 2, 4)
    extract = mmmilan.FeatureExtractor(weights)
    pixels = extract.inputs([str(image)])
    expected = Image.fromarray(cv2.imread(str(image))[..., ::-1]).resize((64, 32), Image.Resampling.BICUBIC)
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    expected = torch.from_numpy((np.float32(expected) - mean) / std).permute(2, 0, 1)
    assert (pixels[0] - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(data='nowhere'), 'nowhere does not exist'),
        (dict(data='.'), 'holds no image'),
        (dict(teacher='none.pt'), 'The teacher none.pt is unknown; give MODEL:TAG'),
        (dict(teacher='ViT-B-16:nobody'), 'nobody'),
        (dict(teacher='ViT-Z-16:openai'), 'ViT-Z-16'),
        (dict(start='none.pth'), 'none.pth is neither a file'),
        (dict(arch='gigantic'), "arch 'gigantic' is unknown"),
        (dict(arch=dict(embed_dims=3)), 'lacks feedforward_channels'),
        (dict(arch=dict(SMALL, embed_dims=30)), r'arch.embed_dims=30 is not a multiple of 4'),
        ({'model.backbone.arch': dict(SMALL, embed_dims=30)}, r'model.backbone.arch.embed_dims=30 is not a mult'),
        (dict(work_dir='x'), r'work_dir is set by the command by its folder \(--out\); leave it out'),
        (dict(launcher='pytorch'), 'launcher is set by the command itself; leave it out'),
        ({'default_hooks.checkpoint.out_dir': 'x'}, 'in .*out; leave default_hooks.checkpoint.out_dir out'),
        (dict(img_size=100), 'not a multiple of patch_size=16'),
        (dict(img_size=(64, 100)), 'img_size=.64, 100. is not a multiple of patch_size=16'),
        (dict(batch_size=25), 'cannot fill one batch of 25'),
        (dict(labelled='.'), 'no folders that name classes'),
        (dict(resume=True), 'holds no checkpoint'),
    ],
)
def test_bad_arguments_are_refused_before_the_run(image_folder, quick, tmp_path, monkeypatch, change, message):
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path / 'empty')
    arguments = {'data': image_folder, **quick, **change}
    with pytest.raises(InputError, match=message) as error:
        mmmilan.pretrain(arguments.pop('data'), tmp_path / 'out', **arguments)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_a_run_in_a_folder_that_it_reads(image_folder, quick, tmp_path):
    """Where images are read nothing is written, whatever way leads there; a new folder beside them is no such."""
    shutil.copytree(image_folder, tmp_path / 'photos')
    (tmp_path / 'link').symlink_to('photos')
    before = sorted(tmp_path.rglob('*'))
    for data, out in (('photos', 'photos'), ('photos', 'link'), ('link', 'photos/class0'), ('photos', 'photos/.')):
        with pytest.raises(InputError, match='holds images that .*_dataloader.dataset reads; choose another folder'):
            mmmilan.pretrain(tmp_path / data, tmp_path / out, **quick)
    assert sorted(tmp_path.rglob('*')) == before
    check_is_not_read(tmp_path / 'photos/run', new_config([tmp_path / 'photos'], teacher=quick['teacher'], img_size=64))


@pytest.mark.parametrize('width', [100, 36, 68])
def test_the_heads_of_the_decoder_share_its_width(image_folder, quick, width):
    arch = dict(SMALL, embed_dims=width, num_heads=1)
    neck = new_config([image_folder], arch=arch, teacher=quick['teacher'], img_size=64).model.neck
    assert neck.decoder_embed_dim == width and width % neck.decoder_num_heads == 0


@pytest.mark.slow
def test_command(image_folder, quick, tmp_path, capfd):
    changes = [argument for key in quick if '.' in key for argument in (f'--{key}', str(quick[key]))]
    command = ['pretrain', image_folder, '--out', tmp_path / 'run', '--arch', 'tiny', '--teacher', quick['teacher']]
    options = ['--epochs', 1, '--img-size', 64, 80, '--model.neck.decoder_depth=1', *changes]
    cli.main([*map(str, command), *map(str, options)])
    printed = capfd.readouterr().out
    assert printed.strip().endswith(f'{tmp_path}/run/milan.pth')
    config = own_config(tmp_path / 'run/milan.pth')
    assert config.model.backbone.arch == 'deit-tiny' and config.model.neck.decoder_depth == 1
    assert config.model.backbone.img_size == (64, 80)
    # the console has what a person reads, the log file everything
    [log] = (tmp_path / 'run').glob('*/*.log')
    for block in ('System environment:', 'Config:\nauto_scale_lr', 'Hooks will be executed', 'paramwise_options'):
        assert block in log.read_text() and block not in printed
    assert 'Evaluation after epoch 1' in printed and printed.count('\n') < 40


@pytest.mark.slow
def test_a_large_folder_is_listed_once_and_its_records_are_compact(tmp_path, quick, monkeypatch):
    """What comes before the first step, for ten thousand images in two hundred folders of classes."""
    for folder in range(200):
        root = tmp_path / 'photos' / f'class{folder:03}'
        root.mkdir(parents=True)
        for image in range(50):
            (root / f'img_{image:06}.jpg').touch()
    scanned, scandir, built = Counter(), os.scandir, []
    monkeypatch.setattr(os, 'scandir', lambda path: scanned.update([str(path)]) or scandir(path))

    def train(runner: Runner) -> None:
        hook = next(hook for hook in runner.hooks if isinstance(hook, OnlineEvaluationHook))
        monkeypatch.setattr(hook, 'evaluate', lambda *args: None)
        hook.before_train(runner)
        order = [int(draw) for draw in runner.train_dataloader.sampler]
        assert sorted(order) == list(range(10000)) and order != sorted(order)
        labels = hook.dataset.get_gt_labels()
        assert (np.bincount(labels) == 50).all()
        assert len(hook.chosen) == 1000 and set(np.bincount(labels[hook.chosen])) == {0, 10}  # of half the classes
        built.extend([runner.train_dataloader.dataset, hook.dataset])
        raise InputError('far enough; stop.')

    monkeypatch.setattr(Runner, 'train', train)
    with pytest.raises(InputError, match='far enough'):
        mmmilan.pretrain(tmp_path / 'photos', tmp_path / 'run', **quick)
    read = {path: number for path, number in scanned.items() if path.startswith(str(tmp_path / 'photos'))}
    assert len(read) == 201 and set(read.values()) == {1}
    for dataset, label in zip(built, (0, 4), strict=True):
        record, part = dataset.get_data_info(4321), dataset.get_subset([4321])
        assert record['img_path'] == str(tmp_path / 'photos/class086/img_000021.jpg')
        assert record.get('gt_label', 86) == 86 and part.get_data_info(0) == record | dict(sample_idx=0)
        size = len(record['img_path']) + 1 + label + 8  # a zero byte, the label, and where the record ends
        assert dataset.data_bytes.nbytes + dataset.data_address.nbytes == size * 10000 and not dataset.data_list


def test_recipes(image_folder, quick):
    """Few images have random masks of half the patches and a class token with a third of the loss."""
    given = {name: quick[name] for name in ('arch', 'teacher', 'img_size')}
    few, published = (new_config([str(image_folder)], **given, recipe=recipe) for recipe in (None, 'milan'))
    assert few.model.masking == dict(type='mmmilan.RandomMasking', mask_ratio=0.5)
    assert few.model.head.cls_token / (few.model.head.cls_token + 16) == pytest.approx(1 / 3)
    assert published.model.masking == dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75)
    assert 'cls_token' not in published.model.head
    assert (few.model.neck.decoder_depth, published.model.neck.decoder_depth) == (1, 4)
    assert about_recipe(few) == (
        'Recipe few-images, the default up to 100,000 images, here 24: random masks of 50% of the patches; a decoder '
        'of 1 block; the class token weighs in the loss as 8 patches. On CIFAR-10 this was better than the '
        'published method.'
    )
    assert about_recipe(published) == (
        'Recipe milan, as asked for: semantic-aware masks of 75% of the patches; a decoder of 4 blocks; the class '
        'token weighs in the loss as 1 patch. This is the published method.'
    )


@pytest.mark.parametrize(
    ('changes', 'masks', 'weight', 'words'),
    [
        (
            {'model.masking.type': 'mmmilan.SemanticAwareMasking'},
            'SemanticAware',
            8,
            'semantic-aware masks of 75%.* 8 patches.',
        ),
        ({'model.head.cls_token': 3}, 'Random', None, 'random masks of 50%.*; '),
        (dict(model=dict(head=dict(type='mmmilan.PixelTarget', _delete_=True))), 'Random', None, 'random masks'),
        ({'model.head.type': 'mmmilan.LayerAlignment'}, 'Random', None, 'random masks'),
        ({'model.masking.mask_ratio': 0.75}, 'Random', 8, 'random masks of 75%.* 8 patches.'),
        ({'model.neck.decoder_depth': 2}, 'Random', 8, 'a decoder of 2 blocks'),
        ({'model.neck.type': 'mmmilan.MAEDecoder'}, 'Random', 8, 'a decoder of 4 blocks'),
        ({'train_dataloader.sampler.crops': 3}, 'Random', 8, '; 3 crops of each image'),
    ],
)
def test_what_the_user_changes_is_no_recipes(changes, masks, weight, words, image_folder, quick):
    given = {name: quick[name] for name in ('arch', 'teacher', 'img_size')}
    config = new_config([str(image_folder)], **given, changes=changes)
    assert config.model.masking.type == f'mmmilan.{masks}Masking' or 'model.masking.type' in changes
    assert config.model.head.get('cls_token') == weight
    config.merge_from_dict(changes)
    about = about_recipe(config)
    assert re.search(words, about) and 'published' not in about


def test_another_teacher_changes_no_recipe(image_folder, quick):
    given = {name: quick[name] for name in ('arch', 'teacher', 'img_size')}
    for changes in ({'model.head.teacher.teacher_mean_std': 'own'}, {'optim_wrapper.optimizer.lr': 1e-4}):
        config = new_config([str(image_folder)], **given, recipe='milan', changes=changes)
        assert about_recipe(config).endswith('This is the published method.')


def test_the_teacher_runs_once_for_each_crop(image_folder, quick, no_report, tmp_path, monkeypatch):
    """By default a crop comes up to eight times. The three evaluations run the teacher too."""
    calls, call_teacher = [], Target.call_teacher
    monkeypatch.setattr(Target, 'call_teacher', lambda self, images: calls.append(1) or call_teacher(self, images))
    weights = mmmilan.pretrain(image_folder, tmp_path / 'run', **quick)
    assert len(calls) == 3 + 3 and not (tmp_path / 'run/teacher_cache').exists()
    config = own_config(weights, with_data=True)
    assert config.train_dataloader.sampler.crops == 1
    assert '; 1 crop of each image; the class token' in about_recipe(config)
    calls.clear()
    mmmilan.pretrain(image_folder, tmp_path / 'new', **quick, **{'train_dataloader.sampler.crops': None})
    assert len(calls) == 6 + 3


def test_crops_by_recipe_and_room(image_folder, quick, monkeypatch, log, tmp_path):
    given = {name: quick[name] for name in ('arch', 'teacher', 'img_size')}

    def crops(epochs: int, changes: dict, **options: object) -> tuple[int | None, bool]:
        config = new_config([str(image_folder)], **given, epochs=epochs, changes=changes, **options)
        change_config(config, changes)
        repeat_crops(config, tmp_path / 'not/there')
        keep_repeated(config)
        return config.train_dataloader.sampler.get('crops'), bool(config.default_hooks.get('teacher_cache'))

    assert [crops(epochs, {})[0] for epochs in (1, 2, 8, 9, 400)] == [None, 1, 1, 2, 50]
    assert crops(20, {}, recipe='milan') == (None, False)
    assert crops(20, {'train_dataloader.sampler.crops': 4}, recipe='milan') == (4, True)
    for other in (
        {'train_dataloader.sampler.crops': None},
        {'model.head.type': 'mmmilan.LayerAlignment'},
        {'train_dataloader.sampler.type': 'DefaultSampler'},
        {'train_dataloader.dataset.pipeline': [dict(type='mmmilan.LoadImage'), dict(type='PackInputs')]},
    ):
        assert crops(20, other)[0] is None
    assert crops(20, {'default_hooks.teacher_cache': None}) == (None, False)
    assert crops(20, {'default_hooks.teacher_cache': None, 'train_dataloader.sampler.crops': 4}) == (4, False)
    needed = 3 * 24 * 17 * 24
    for free, pages, expected in ((2 * needed, 10**9, 3), (2 * needed - 2, 10**9, None), (10**12, needed, None)):
        monkeypatch.setattr('shutil.disk_usage', lambda path, free=free: SimpleNamespace(free=free))
        monkeypatch.setattr('os.sysconf', lambda name, pages=pages: pages if name == 'SC_PHYS_PAGES' else 1)
        assert crops(20, {})[0] == expected
    assert 'What the teacher gives of 3 crops of each image would take 0.0 GB, more than half of the free' in log.text


@pytest.mark.parametrize('part', ['train_dataloader', 'model.head', 'train_cfg', 'model.neck.predict_feature_dim'])
def test_without_a_part_no_crop_comes_again(part, image_folder, quick, tmp_path):
    """What is wrong with such a config is said elsewhere."""
    config = new_config([str(image_folder)], **{name: quick[name] for name in ('arch', 'teacher', 'img_size')})
    config.merge_from_dict({part: None})
    repeat_crops(config, tmp_path)
    assert not ((config.train_dataloader or {}).get('sampler') or {}).get('crops')


def test_the_cache_is_the_users_to_set(image_folder, quick, no_report, tmp_path, monkeypatch):
    """From any folder, where the run is resumed."""
    monkeypatch.chdir(tmp_path)
    hook = dict(default_hooks=dict(teacher_cache=dict(type='mmmilan.TeacherCacheHook', cache='kept')))
    weights = mmmilan.pretrain(image_folder, tmp_path / 'run', **quick, **hook)
    for config in (own_config(weights, with_data=True), Config.fromfile(tmp_path / 'run/config.py')):
        assert config.default_hooks.teacher_cache.cache == str(tmp_path / 'kept')
    assert (tmp_path / 'kept/records.bin').exists()
    mmmilan.pretrain(image_folder, tmp_path / 'without', **quick, **{'default_hooks.teacher_cache': None})


@pytest.mark.parametrize('own', [None, 1])
def test_a_resumed_run_has_crops_for_its_length(own, image_folder, quick, no_report, tmp_path):
    """Unless the user has chosen their number."""
    crops = {} if own is None else {'train_dataloader.sampler.crops': own}
    mmmilan.pretrain(image_folder, tmp_path / 'run', **quick, **crops)
    weights = mmmilan.pretrain(None, tmp_path / 'run', resume=True, epochs=9, seed=3)
    config = own_config(weights, with_data=True)
    assert config.train_dataloader.sampler.crops == (own or 2) and config.default_hooks.teacher_cache
    assert not (tmp_path / 'run/teacher_cache').exists()


def test_crops_that_a_resumed_run_is_given_are_kept(image_folder, quick, no_report, tmp_path, monkeypatch):
    """Also in the published method, which has no hook for it by itself."""
    calls, call_teacher = [], Target.call_teacher
    monkeypatch.setattr(Target, 'call_teacher', lambda self, images: calls.append(1) or call_teacher(self, images))
    mmmilan.pretrain(image_folder, tmp_path / 'run', recipe='milan', **quick | dict(epochs=3))
    stop_after_one_epoch(tmp_path / 'run')
    calls.clear()
    mmmilan.pretrain(out=tmp_path / 'run', resume=True, **{'train_dataloader.sampler.crops': 1})
    assert len(calls) == 3 + 2  # of two epochs, each with an evaluation
    assert Config.fromfile(tmp_path / 'run/config.py').default_hooks.teacher_cache.type == 'mmmilan.TeacherCacheHook'
    assert not (tmp_path / 'run/teacher_cache').exists()


@pytest.mark.parametrize('own', [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_without_its_cache(own, image_folder, quick, no_report, tmp_path, monkeypatch, capfd):
    """Each epoch has new crops again, unless the user wants them to come again, and the cache is removed at the end."""
    with monkeypatch.context() as patch:
        patch.setattr('mmmilan.engine.TeacherCacheHook.after_train', lambda hook, runner: None)  # as if it were stopped
        mmmilan.pretrain(image_folder, tmp_path / 'run', **quick)
    stop_after_one_epoch(tmp_path / 'run')
    cache = tmp_path / 'run/teacher_cache'
    assert cache.exists()
    crops = {} if own is None else {'train_dataloader.sampler.crops': own}
    without = dict(default_hooks=dict(teacher_cache=None))
    with pytest.raises(InputError):
        mmmilan.pretrain(out=tmp_path / 'run', resume=True, arch='tiny', **without)
    assert cache.exists()
    mmmilan.pretrain(out=tmp_path / 'run', resume=True, **without, **crops)
    assert not cache.exists() and f'{cache}, of which the run makes no use' in capfd.readouterr().out
    mmmilan.pretrain(out=tmp_path / 'run', resume=True, epochs=3)  # also the next time
    config = Config.fromfile(tmp_path / 'run/config.py')
    assert config.train_dataloader.sampler.get('crops') == own
    assert config.default_hooks.teacher_cache is None and 'crops' not in config.call.recipe


def test_a_model_that_fails_in_the_evaluation_before_training(image_folder, quick, no_report, tmp_path):
    """BatchNorm takes no tokens [B, N, D]."""
    option = {'model.backbone.norm_cfg': dict(type='BN')}
    with pytest.raises(InputError, match='with the given model.backbone.norm_cfg, but its first step fails'):
        mmmilan.pretrain(image_folder, tmp_path / 'run', **quick | option)


def test_a_start_brings_the_normalisation_of_its_images(image_folder, quick, tmp_path):
    """Also one whose config names types of others: nothing is built from it."""
    vit = VisionTransformer(quick['arch'], img_size=64, patch_size=16)
    model = dict(type='my.Model', data_preprocessor=dict(mean=[127.5] * 3, std=[63.75] * 3, to_rgb=True))
    meta = dict(cfg=Config(dict(model=model, custom_hooks=[dict(type='MyHook')])).pretty_text)
    torch.save(dict(state_dict=vit.state_dict(), meta=meta), tmp_path / 'start.pth')
    options = {name: quick[name] for name in ('arch', 'teacher', 'img_size', 'batch_size')}
    for start, mean in ((None, 123.675), (str(tmp_path / 'start.pth'), 127.5)):
        config = new_config([image_folder], start=start, **options)
        assert config.model.data_preprocessor.mean[0] == mean
    assert encoder_in(str(tmp_path / 'start.pth')).normalisation['std'] == [63.75] * 3  # of finetune
