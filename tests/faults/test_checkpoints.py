"""Saving that crashes at any moment leaves a whole checkpoint; resuming from a spoilt one says what is wrong."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.errors import InputError
from mutations import spoil_values, write
from small_runs import Model, runner


class Killed(BaseException):
    """Stands in for a kill."""


def crash_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Raise :class:`Killed` at a call of what touches the disk; every later call does nothing, as after a kill."""
    count = 0

    def crashing(function, half=None):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment and half:
                half(*args)
            if count >= moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    def half_of_it(checkpoint, file):
        file.write(b'PK\x03\x04 the start of a checkpoint')

    monkeypatch.setattr(torch, 'save', crashing(torch.save, half_of_it))
    monkeypatch.setattr(os, 'fsync', crashing(os.fsync))
    monkeypatch.setattr(os, 'replace', crashing(os.replace))
    monkeypatch.setattr(Path, 'unlink', crashing(Path.unlink))


@pytest.mark.parametrize('moment', range(1, 13))
def test_a_crash_while_saving(tmp_path, monkeypatch, moment):
    """Only one checkpoint is kept, so a crash could lose all."""
    first = runner(tmp_path, epochs=1, checkpoint=dict(max_keep_ckpts=1))
    first.train()
    second = runner(tmp_path, checkpoint=dict(max_keep_ckpts=1), load_from=str(tmp_path / 'epoch_1.pth'), resume=True)
    crash_at(monkeypatch, moment)
    crashed = True
    try:
        second.train()
        crashed = False
    except Killed:
        pass
    monkeypatch.undo()
    assert crashed == (moment < 11)
    whole = [load_checkpoint_file(path)['meta']['epoch'] for path in tmp_path.glob('epoch_*.pth')]
    assert whole and max(whole) == (1 if moment <= 3 else 2)
    assert (tmp_path / 'last_checkpoint').read_text() in map(str, tmp_path.glob('epoch_*.pth'))


def test_the_best_checkpoint_is_replaced_by_a_better_one(tmp_path, monkeypatch):
    run = runner(tmp_path, checkpoint=dict(save_best='score', rule='greater'))
    hook = next(hook for hook in run.hooks if type(hook).__name__ == 'CheckpointHook')
    run.train()
    hook._save_best_checkpoint(run, {'score': 1.0})
    best = Path(hook.best_ckpt_path)
    hook._save_best_checkpoint(run, {'score': 2.0})  # of the same epoch, so of the same name
    assert best.is_file()
    run.train_loop._epoch += 1
    hook._save_best_checkpoint(run, {'score': 3.0})
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_score_epoch_3.pth']
    run.train_loop._epoch += 1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, 'replace', lambda *args: (_ for _ in ()).throw(Killed))
        hook._save_best_checkpoint(run, {'score': 4.0})
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_score_epoch_3.pth']
    with pytest.raises(InputError, match=r'gives no score, by which .*save_best chooses; name one .*\(top1, top5\)'):
        hook._save_best_checkpoint(run, dict(top1=1.0, top5=2.0))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    runner(tmp_path, epochs=1, checkpoint=dict(max_keep_ckpts=1)).train()

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(InputError, match=r'epoch_2\.pth was not written .*No space left.*free space'):
        runner(
            tmp_path, checkpoint=dict(max_keep_ckpts=1), load_from=str(tmp_path / 'epoch_1.pth'), resume=True
        ).train()
    assert load_checkpoint_file(tmp_path / 'epoch_1.pth')['meta']['epoch'] == 1


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / '.epoch_1.pth.ab12_xyz.mmmilan-tmp').write_bytes(b'half')
    runner(tmp_path, epochs=1).train()
    assert not list(tmp_path.glob('.*'))


# -- resuming


@pytest.mark.slow
def test_spoilt_training_states(tmp_path, safe_mmengine):
    """The run resumes or says what is wrong; a spoilt state would crash a fused optimizer and with it the process."""
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
    with pytest.raises(InputError, match='weights.pth holds only weights .*load_from=FILE'):
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
