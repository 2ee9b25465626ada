"""A work dir: the newest whole checkpoint is found whatever is broken, earlier runs are kept, one run at a time."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmmilan.checkpoints.io import find_newest
from mmmilan.engine.work_dir import locked, make_paths_absolute, prepare
from mmmilan.errors import InputError
from mutations import spoil_bytes
from processes import fork
from small_runs import runner


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A work dir with three checkpoints."""
    work_dir = tmp_path_factory.mktemp('run')
    runner(work_dir, epochs=3).train()
    return work_dir


LAST_CHECKPOINTS = [
    None,
    b'',
    b'\xff\xfe\0',
    b'work/epoch_3.pth',
    b'/nowhere/epoch_3.pth',
    b'epoch_9.pth',
    b'epoch_1.pth',
]


@pytest.mark.parametrize('content', LAST_CHECKPOINTS)
def test_resume_whatever_last_checkpoint_says(finished, tmp_path, monkeypatch, content):
    shutil.copytree(finished, tmp_path / 'work')
    (tmp_path / 'work/last_checkpoint').unlink()
    if content is not None:
        (tmp_path / 'work/last_checkpoint').write_bytes(content)
    monkeypatch.chdir(tmp_path)  # and from another directory
    cfg = Config(dict(resume=True, work_dir='work'))
    prepare(cfg, main=True)
    assert cfg.load_from == 'work/epoch_3.pth'


@pytest.mark.parametrize('seed', range(10))
def test_resume_falls_back(finished, tmp_path, seed, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    rng = random.Random(seed)
    for number in (2, 3):
        path = tmp_path / f'epoch_{number}.pth'
        content = spoil_bytes(path.read_bytes(), rng)
        while content == path.read_bytes():  # zeros on zeros
            content = spoil_bytes(content, rng)
        path.write_bytes(content)
    said = []
    monkeypatch.setattr('mmmilan.checkpoints.io.warn', said.append)
    newest = find_newest(tmp_path)
    for number in (2, 3):
        path = tmp_path / f'epoch_{number}.pth'
        # a fault in bytes that nothing reads leaves the checkpoint whole
        assert any(message.startswith(f'{path} is skipped: ') for message in said) or newest == path
    torch.load(newest, weights_only=False)


def test_nothing_whole_is_not_a_new_run(tmp_path):
    (tmp_path / 'epoch_1.pth').write_bytes(b'PK\x03\x04')
    with pytest.raises(InputError, match='Of 1 checkpoint in .* none is complete'):
        prepare(Config(dict(resume=True, work_dir=str(tmp_path))), main=True)


def test_a_new_run_does_not_write_over_an_earlier_one(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    cfg = Config(dict(work_dir=str(tmp_path), load_from=str(tmp_path / 'epoch_2.pth')))
    with pytest.raises(InputError, match=r'epoch_2\.pth belongs to an earlier run in the same work dir'):
        prepare(cfg, main=True)
    cfg.load_from = None
    prepare(cfg, main=True)
    assert {path.name for path in (tmp_path / 'earlier_1').iterdir()} == {
        'epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth', 'last_checkpoint',
    }  # fmt: skip
    assert not list(tmp_path.glob('*.pth'))


def test_a_finished_run_says_so(finished, tmp_path, safe_mmengine):
    said = []
    built = runner(tmp_path, epochs=3, load_from=str(finished / 'epoch_3.pth'), resume=True)
    built.logger.warning = said.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmmilan.engine.resuming.warn', said.append)
        built.train()
    assert any('finished run' in message and 'train_cfg.max_epochs (now 3)' in message for message in said)


def hold(work_dir: Path, pipe) -> None:
    with locked(work_dir):
        pipe.send('held')
        time.sleep(600)


def test_a_second_run_is_refused(tmp_path):
    ours, its = multiprocessing.Pipe()
    first = fork(hold, tmp_path, its)
    assert ours.poll(60) and ours.recv() == 'held'
    with pytest.raises(InputError, match=f'in use by another run \\(process {first.pid} on '), locked(tmp_path):
        pass
    (tmp_path / '.lock').write_text('')  # as in the instant before the other run has written who it is
    with pytest.raises(InputError, match='in use by another run; end that one'), locked(tmp_path):
        pass
    first.kill()  # the lock ends with the process
    first.join()
    with locked(tmp_path):
        pass


def test_a_cache_has_an_absolute_path_before_it_is_there(tmp_path, monkeypatch):
    """What may be a name and no path stays, and None or '', the run's own cache."""
    monkeypatch.chdir(tmp_path)
    for cache, expected in (('cache', str(tmp_path / 'cache')), ('/a', '/a'), (None, None), ('', '')):
        hooks = dict(teacher_cache=dict(type='mmmilan.TeacherCacheHook', cache=cache))
        config = dict(default_hooks=hooks, train_dataloader=dict(dataset=dict(type='Other', cache='ram')))
        make_paths_absolute(config)
        assert config['default_hooks']['teacher_cache']['cache'] == expected
        assert config['train_dataloader']['dataset']['cache'] == 'ram'
