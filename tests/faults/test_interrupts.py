"""Ctrl-C at random moments of every command: one line, exit status 130, nothing unfinished is left."""

from __future__ import annotations

import os
import pkgutil
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from helpers import ROOT, rest_slow
from mmmilan import cli
from mmmilan.engine.stopping import RESUMABLE
from mmmilan.errors import INTERRUPTED, end_at_interrupt, exit_on_input_error, is_command
from mmmilan.files import ENDING, atomic_write
from processes import exit_codes, fork
from scenes import write_scenes

TINY = '{embed_dims: 48, num_layers: 2, num_heads: 3, feedforward_channels: 96}'
# Command line of each command in a folder with images, a config, a checkpoint and a teacher.
COMMANDS = {
    'embed': 'mmmilan embed images --checkpoint milan.pth --out out.npz --num-workers 2 --batch-size 2',
    'report': 'mmmilan report images milan.pth --out page.html',
    'figures': 'mmmilan figures images milan.pth figures --config config.py',
    'convert': 'mmmilan convert milan.pth vit.safetensors --to timm --encoder-only',
    'export-onnx': 'mmmilan export-onnx milan.pth vit.onnx',
    'finetune': 'mmmilan finetune images finetuned --start milan.pth --epochs 1 --batch-size 4 --compare scratch',
    'train': 'tools/train.py config.py',
    'test': 'tools/test.py config.py milan.pth --out predictions.pkl',
    'cache': 'tools/cache_targets.py config.py cache --epochs 20',
    'pack': 'tools/pack_images.py images images.lmdb',
    'publish': 'tools/publish_model.py config.py milan.pth published --hub-dir hub',
}


@pytest.fixture(autouse=True)
def heard():
    """Signals are as a command finds them.

    A shell that starts the tests in the background makes them, and what they start, ignore SIGINT; a test that trains
    in this process leaves a handler of SIGTERM, which a forked worker of a pool would have, too.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_in_fork(folder: Path, run: Callable, *args: object) -> None:
    """Be a command: its output goes to ``folder / 'output'``, and it is ready once Ctrl-C is handled."""
    os.setpgid(0, 0)
    end_at_interrupt()
    output = os.open(folder / 'output', os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    (folder / 'ready').touch()
    run(*args)


def run_command(line: str) -> None:
    program, *arguments = line.split()
    if program == 'mmmilan':
        cli.main(arguments)
        return
    sys.argv = [str(ROOT / program), *arguments]
    sys.path.insert(0, str((ROOT / program).parent))
    runpy.run_path(str(ROOT / program), run_name='__main__')


def press(folder: Path, seconds: float, whole_group: bool, run: Callable, *args: object) -> tuple[int | None, str]:
    """Run in a fork and send SIGINT after some seconds: exit status, and what was printed."""
    (folder / 'ready').unlink(missing_ok=True)
    process = fork(run_in_fork, folder, run, *args)
    while not (folder / 'ready').exists():
        time.sleep(0.01)
    time.sleep(seconds)
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    [code] = exit_codes([process], 120)
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
    return code, (folder / 'output').read_text()


def check(folder: Path, code: int | None, output: str) -> None:
    assert code in (0, INTERRUPTED, RESUMABLE), output
    assert 'Traceback' not in output and 'KeyboardInterrupt' not in output, output
    assert output.splitlines().count('interrupted') == (code == INTERRUPTED), output
    assert not list(folder.rglob(f'.*{ENDING}'))


@pytest.fixture
def folder(tiny_config, pretrained_checkpoint, image_folder, tmp_path):
    work = tmp_path / 'work place'
    work.mkdir()
    shutil.copytree(image_folder, work / 'images')
    shutil.move(tiny_config(), work / 'config.py')
    shutil.move(pretrained_checkpoint, work / 'milan.pth')
    return work


@pytest.mark.parametrize('seed', rest_slow(range(2), 0))
@pytest.mark.parametrize('name', rest_slow(COMMANDS, 'embed', 'train'))
def test_every_command(folder, name, seed):
    rng = random.Random(f'{name} {seed}')
    code, output = press(folder, rng.uniform(0, 3), rng.random() < 0.5, run_command, COMMANDS[name])
    check(folder, code, output)


# Functions of finetune at whose beginning Ctrl-C comes, how often they have been called by then, and the folder of the
# run that is then left without its model.
MOMENTS = {
    'mmmilan.api.finetune_probe.frozen_features': (1, 'finetuned'),
    'mmmilan.api.finetune_run.save_weights': (1, 'finetuned'),
    'mmmilan.engine.loops.EpochLoop.run_epoch': (2, 'finetuned/compare'),
}


def run_until(name: str, count: int, line: str) -> None:
    """Run a command that presses Ctrl-C itself when a function is called for this time."""
    place, _, attribute = name.rpartition('.')
    owner, left = pkgutil.resolve_name(place), count
    function = getattr(owner, attribute)

    def pressed(*args: object) -> object:
        nonlocal left
        left -= 1
        if not left:
            signal.raise_signal(signal.SIGINT)
        return function(*args)

    setattr(owner, attribute, pressed)
    run_command(line)


@pytest.mark.slow
@pytest.mark.parametrize('name', MOMENTS)
def test_finetune_goes_on(folder, name):
    """Wherever it was interrupted, it ends when it is typed again, with --resume if it had begun to train."""
    count, unfinished = MOMENTS[name]
    workers = ' '.join(f'--{each}_dataloader.num_workers 0' for each in ('train', 'val', 'test'))
    line = f'{COMMANDS["finetune"]} {workers}'
    process = fork(run_in_fork, folder, run_until, name, count, line)
    [code] = exit_codes([process], 120)
    check(folder, code, (folder / 'output').read_text())
    assert code in (INTERRUPTED, RESUMABLE) and not (folder / unfinished / 'model.pth').exists()
    line = 'mmmilan finetune --out finetuned --resume' if (folder / 'finetuned/config.py').exists() else line
    [code] = exit_codes([fork(run_in_fork, folder, run_command, line)], 120)
    assert code == 0, (folder / 'output').read_text()
    assert (folder / 'finetuned/comparison.json').exists()


def draw(folder: Path) -> None:
    with exit_on_input_error():
        write_scenes(folder / 'scenes', 3000, 1000)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_a_pool_of_processes(tmp_path, seed):
    code, output = press(tmp_path, random.Random(seed).uniform(0.2, 2), seed % 2 == 0, draw, tmp_path)
    check(tmp_path, code, output)
    assert code == INTERRUPTED and not (tmp_path / 'scenes').exists()


def swallow(folder: Path) -> None:
    """Code that would swallow a KeyboardInterrupt."""
    with exit_on_input_error(), atomic_write(folder / 'file') as temporary:
        Path(temporary).write_text('half')
        while True:
            with suppress(BaseException):
                time.sleep(0.01)


def test_nothing_swallows_it(tmp_path):
    code, output = press(tmp_path, 0.2, False, swallow, tmp_path)
    assert (code, output) == (INTERRUPTED, 'interrupted\n')
    assert {path.name for path in tmp_path.iterdir()} == {'output', 'ready'}


def ignore(folder: Path) -> None:
    with exit_on_input_error():
        time.sleep(1)


def test_where_the_shell_ignores_it(tmp_path, monkeypatch):
    """As for a command that a script starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert press(tmp_path, 0.2, False, ignore, tmp_path) == (0, '')
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_program_of_the_user_keeps_its_own(monkeypatch, tmp_path):
    assert not is_command()
    (tmp_path / 'mmmilan').mkdir()
    monkeypatch.chdir(tmp_path / 'mmmilan')
    for script, expected in [
        (ROOT / 'tools/train.py', True),
        (ROOT / 'mmmilan/.mim/tools/test.py', True),
        (ROOT / 'tools/speed/benchmark.py', True),
        (tmp_path / 'bin/mmmilan', True),
        (tmp_path / 'tools/train.py', False),
        (tmp_path / 'mmmilan/train.py', False),
        ('', False),  # python -c, in a folder called mmmilan
    ]:
        monkeypatch.setattr(sys, 'orig_argv', ['python', str(script)])
        monkeypatch.setattr(sys.modules['__main__'], '__file__', str(script), raising=False)
        assert is_command() is expected, script
    for options, expected in [
        ('-m mmmilan.torchrun', True),
        ('-X dev -W error -Im mmmilan.cli', True),
        ('-m pytest', False),
        ('-m mmmilano', False),
        ('-m', False),
        ('run.py -m', False),  # Hydra's sweep
        ('-u run.py -m mmmilan.cli', False),
        ('-c pass -m mmmilan.cli', False),
    ]:
        monkeypatch.setattr(sys, 'orig_argv', ['python', *options.split()])
        assert is_command() is expected, options


@pytest.mark.parametrize('moment', [0, 1, *(pytest.param(0.2 * i, marks=pytest.mark.slow) for i in range(1, 30, 7))])
@pytest.mark.parametrize('program', ['tools/train.py', pytest.param('mmmilan/cli.py', marks=pytest.mark.slow)])
def test_while_it_starts(moment, program, tmp_path):
    """At any moment of the seconds of imports, once Python itself has started."""
    command = [sys.executable, '-m', 'mmmilan.cli', 'embed', '.', 'm.pth', 'f.npz']
    if program.startswith('tools'):
        command = [sys.executable, ROOT / program, 'missing.py']
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    while 'wrapt' not in Path(f'/proc/{process.pid}/maps').read_text():  # a library of the package's first import
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert (process.returncode, error) == (INTERRUPTED, 'interrupted\n') or error.startswith('error: ')
