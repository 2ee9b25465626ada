"""What stands in the log, and who writes it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from mmmilan.engine import MainLoggerHook
from mmmilan.engine.log import LEFT_OUT, ConsoleRunner, is_for_console


def test_only_the_main_process_writes_the_figures(monkeypatch):
    monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: 1)
    MainLoggerHook().after_test_epoch(runner=None, metrics=dict(loss=1.0))  # would fail if it looked at the runner
    monkeypatch.undo()
    with pytest.raises(AttributeError):
        MainLoggerHook().after_test_epoch(runner=None, metrics=dict(loss=1.0))


@pytest.mark.parametrize(
    ('message', 'level', 'on_the_console'),
    [
        ('Epoch(train) [1][10/20]  loss: 1.2', logging.INFO, True),
        ('paramwise_options -- backbone.cls_token:lr=0.1', logging.INFO, False),
        ('Config:\nmodel = dict(\n' + '    a=1,\n' * 5, logging.INFO, False),
        ('One\nlong\nwarning\nof\nsix\nlines', logging.WARNING, True),
        ('FileClient is a word that a warning may have', logging.WARNING, True),
    ],
)
def test_the_console_has_short_messages_and_warnings(message, level, on_the_console):
    record = logging.LogRecord('mmengine', level, __file__, 1, message, None, None)
    assert is_for_console(record) is on_the_console


def test_words_of_libraries_on_themselves_stand_in_the_file_alone(tiny_config, monkeypatch, capfd):
    """A run on a CPU by a config that pins memory for GPUs and saves a checkpoint."""
    monkeypatch.setattr('mmengine.fileio.FileClient._instances', {})  # which speak once in a process
    cfg = Config.fromfile(tiny_config())
    cfg.train_dataloader.pin_memory = True
    cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        ConsoleRunner.from_cfg(cfg).train()
    printed, written = capfd.readouterr(), next(Path(cfg.work_dir).glob('*/*.log')).read_text()
    printed = printed.out + printed.err
    assert 'Epoch(train)' in printed and 'Epoch(train)' in written
    for words in LEFT_OUT[1:]:
        assert words in written and words not in printed
    assert not [each for each in warned if 'pin_memory' in str(each.message)]


def test_a_line_every_few_seconds(monkeypatch):
    """Of 100 steps that take 4 s each, those of every second one when a line is due after 10 s at most."""
    clock, lines = [0.0], []
    monkeypatch.setattr('mmmilan.engine.log.time.monotonic', lambda: clock[0])
    hook = MainLoggerHook(interval=10, seconds=10.0)
    runner = SimpleNamespace(
        hooks=[hook], iter=0, work_dir='', train_dataloader=[None] * 100, timestamp='', _log_dir='',
        logger=SimpleNamespace(info=lines.append), visualizer=SimpleNamespace(add_scalars=lambda *args, **kwargs: None),
        log_processor=SimpleNamespace(get_log_after_iter=lambda runner, step, mode: ({}, step + 1)),
    )  # fmt: skip
    hook.before_train(runner)
    for step in range(20):
        clock[0] += 4
        runner.iter = step
        hook.after_train_iter(runner, step)
    assert lines == [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
