"""Checks before a run starts, and the end of a run that cannot start."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

import mmmilan
from helpers import ROOT, save_untrained
from mmmilan import torchrun
from mmmilan.cli import main
from mmmilan.engine import ImageSizeHook
from mmmilan.engine.config_check import check_data
from mmmilan.engine.launch import test as run_test
from mmmilan.errors import InputError
from mmmilan.models import DenseViT, MILANViT
from processes import run_script

ARCH = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)


MISSING = [
    (
        'detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py',
        'train',
        'data/coco',
        'train_dataloader.dataset',
    ),
    (
        'detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py',
        'test',
        'data/coco',
        'test_dataloader.dataset',
    ),
    (
        'segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py',
        'train',
        'data/ade/ADEChallengeData2016',
        'train_dataloader.dataset',
    ),
]


@pytest.mark.parametrize(('config', 'task', 'folder', 'option'), MISSING)
def test_missing_data_set(config, task, folder, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        check_data(Config.fromfile(ROOT / 'configs' / config), task)
    assert str(error.value) == (f'The data folder {folder} does not exist; set {option}.data_root to your data.')


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_a_launcher_that_did_not_start_this_process(launcher, tiny_config, tmp_path):
    with pytest.raises(InputError, match=f"launcher='{launcher}', but that did not start this process"):
        mmmilan.train(str(tiny_config()), launcher=launcher)
    assert not (tmp_path / 'work').exists()


def test_missing_annotations(tmp_path, monkeypatch):
    """First those of the data set, then those of the evaluator."""
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(ROOT / 'configs/detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py')
    (tmp_path / 'coco/annotations').mkdir(parents=True)
    cfg.test_dataloader.dataset.data_root = 'coco'
    file = 'annotations/instances_val2017.json'
    with pytest.raises(InputError, match=f'The annotations coco/{file} do not exist; set test_dataloader.dataset.'):
        check_data(cfg, 'test')
    (tmp_path / 'coco' / file).touch()
    with pytest.raises(InputError, match=f'The annotations data/coco/{file} do not exist; set test_evaluator.ann_file'):
        check_data(cfg, 'test')
    cfg.test_evaluator.ann_file = f'coco/{file}'
    check_data(cfg, 'test')


def test_missing_labelled_images_of_knn(image_folder):
    cfg = Config.fromfile(ROOT / 'configs/milan/benchmarks/vit-base-p16_knn_in1k.py')
    cfg.test_dataloader.dataset.data_root = str(image_folder)
    with pytest.raises(InputError, match='data/imagenet/train does not exist; set test_cfg.bank_dataloader.dataset'):
        check_data(cfg, 'test')


def say_size(model: torch.nn.Module, inputs: object) -> list[str]:
    said: list[str] = []
    runner = SimpleNamespace(model=SimpleNamespace(backbone=model), logger=SimpleNamespace(warning=said.append))
    hook = ImageSizeHook()
    for i in range(3):
        hook.before_test_iter(runner, i, dict(inputs=inputs))
    return said


def test_image_size_that_is_not_the_encoders():
    encoder = MILANViT(arch=ARCH, img_size=64, patch_size=16)
    (message,) = say_size(encoder, [torch.zeros(3, 224, 224)])  # once
    assert message.startswith('The images are (224, 224) but img_size=(64, 64): positions are interpolated; make ')
    assert not say_size(encoder, torch.zeros(2, 3, 64, 64))
    dense = DenseViT(arch=ARCH, img_size=64, patch_size=16, out_indices=(0, 1, 2, 3))
    assert not say_size(dense, [torch.zeros(3, 224, 224)])


IMPORTED = """
import atexit


class Witness:
    def __del__(self):
        print('freed')


witness = Witness()
atexit.register(print, 'registered for the exit')
"""


def test_a_job_that_is_always_resumed_starts_from_its_weights(tiny_config, run_tool, tmp_path):
    """As on a cluster that stops jobs: the first start has no checkpoint, the second one has."""
    once = {'train_cfg.max_epochs': 1, 'param_scheduler': None, 'train_dataloader.num_workers': 0}
    run_tool('train.py', tiny_config(once))
    again = once | {'work_dir': str(tmp_path / 'job'), 'load_from': str(tmp_path / 'work/epoch_1.pth')}
    for epochs in (1, 2):
        run_tool('train.py', tiny_config(again | {'train_cfg.max_epochs': epochs}), '--resume')
        logs = ''.join(path.read_text() for path in (tmp_path / 'job').glob('*/*.log'))
        assert logs.count('Load checkpoint from') == epochs and logs.count('resumed epoch: 1') == epochs - 1


@pytest.mark.slow
def test_runs_that_start_in_one_second(scenes, tmp_path, monkeypatch):
    """Each has a log and scores of its own: of another process, twice in this one, and in another folder."""
    weights, second = save_untrained('classification', scenes, tmp_path), '20260101_000000'
    clock = SimpleNamespace(time=time.time, localtime=time.localtime, strftime=lambda *_: second)
    monkeypatch.setattr('mmengine.runner.runner.time', clock)
    log = tmp_path / 'a' / second / f'{second}.log'
    log.parent.mkdir(parents=True)
    log.write_text('of another process')
    for folder in 'aabb':
        run_test(weights, work_dir=tmp_path / folder)
    assert log.read_text() == 'of another process' and list(log.parent.iterdir()) == [log]
    runs = [path for folder in 'ab' for path in sorted((tmp_path / folder).iterdir()) if path.is_dir()][1:]
    assert len({path.name for path in runs}) == len(runs) == 4
    for path in runs:
        assert 'accuracy/top1' in json.loads((path / f'{path.name}.json').read_text())
        assert (path / f'{path.name}.log').read_text().count('Epoch(test)') == 1


def test_a_launched_process_ends_without_freeing_its_modules(tiny_config, tmp_path, monkeypatch):
    """Threads of gloo may still use them. Functions registered with atexit are called."""
    (tmp_path / 'imported.py').write_text(IMPORTED)
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{ROOT}')
    changes = dict(custom_imports=dict(imports=['imported'], allow_failed_imports=False))
    config = tiny_config(changes | {'train_cfg.max_epochs': 1, 'train_dataloader.num_workers': 0})
    output = run_script('dist_train.sh', config, 1)
    assert 'registered for the exit' in output and 'freed' not in output
    assert (tmp_path / 'work/epoch_1.pth').exists()


@pytest.fixture
def torchrun_called(monkeypatch):
    """Records torchrun's options, on a machine of so many GPUs."""

    def start(available: int, gpus: int, **environment: str) -> dict[str, str]:
        called: list[str] = []
        for name in ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', 'SLURM_STEP_NUM_NODES'):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: available)
        monkeypatch.setattr(torchrun, 'main', called.extend)
        main(['train', 'config.py', '--gpus', str(gpus)])
        return dict(word[2:].split('=') for word in called if '=' in word)

    return start


@pytest.mark.parametrize(
    ('available', 'gpus', 'environment', 'expected'),
    [
        (8, 8, {}, dict(nnodes='1', nproc_per_node='8')),
        (0, 16, {}, dict(nnodes='1', nproc_per_node='16')),  # processes of a CPU
        (8, 8, dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='a'), dict(nnodes='2', node_rank='1', nproc_per_node='8')),
        (8, 16, dict(NNODES='2', MASTER_ADDR='a'), dict(nnodes='2', nproc_per_node='8', master_addr='a')),
        (
            4,
            4,
            dict(NNODES='3', MASTER_ADDR='a', PORT='1234'),
            dict(nnodes='3', nproc_per_node='4', master_port='1234'),
        ),
    ],
)
def test_processes_of_this_machine(torchrun_called, available, gpus, environment, expected):
    assert expected.items() <= torchrun_called(available, gpus, **environment).items()


def test_processes_under_srun(torchrun_called, monkeypatch, tmp_path):
    """One task on each of two machines: Slurm says which this is, and where they meet."""
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[07-08]" ] && printf "n07\\nn08\\n"\n')
    scontrol.chmod(0o755)
    step = dict(SLURM_STEP_NUM_NODES='2', SLURM_STEP_NODELIST='n[07-08]', SLURM_NODEID='1')
    step['PATH'] = f'{tmp_path}:{os.environ["PATH"]}'
    expected = dict(nnodes='2', node_rank='1', master_addr='n07', nproc_per_node='8')
    assert expected.items() <= torchrun_called(8, 16, **step).items()


@pytest.mark.parametrize(
    ('available', 'gpus', 'environment', 'machines', 'each'),
    [(8, 16, {}, 2, 8), (1, 2, {}, 2, 1), (6, 16, {}, 4, 4), (8, 64, dict(NNODES='2', MASTER_ADDR='a'), 8, 8)],
)
def test_fewer_gpus_than_asked_for(torchrun_called, available, gpus, environment, machines, each):
    with pytest.raises(SystemExit) as error:
        torchrun_called(available, gpus, **environment)
    assert f'gpus={gpus}, but this machine has {available}; lower it, or run on {machines} machines' in str(error.value)
    for rank in (0, machines - 1):
        line = f'NODE_RANK={rank} MASTER_ADDR=ADDRESS_OF_THE_FIRST mmmilan train config.py --gpus {each}`'
        assert f'`NNODES={machines} {line}' in str(error.value)


def test_several_machines_must_know_the_first(torchrun_called):
    with pytest.raises(SystemExit, match='NNODES=2, but no MASTER_ADDR; set it to the address of the first machine'):
        torchrun_called(8, 8, NNODES='2')
