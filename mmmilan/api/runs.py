"""What the runs of ``pretrain`` and ``finetune`` have in common: their folder, the training, the model in the end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmilan.errors import InputError, warn

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.config import Config


def check_out(folder: Path, resume: bool, files: Sequence[str]) -> None:
    """Refuse to overwrite a run or other files, or to resume where there is no run.

    A run that was stopped before its first checkpoint, which has its config alone, may be resumed, or replaced.

    Args:
        folder: Where the run writes.
        resume: Whether it continues one.
        files: What it writes beside what every run does.

    Raises:
        InputError: the folder holds a run or another's files and ``resume`` is False, or there is no run to resume; or
            nothing can be written there.
    """
    from mmmilan.checkpoints.config import WRITTEN
    from mmmilan.checkpoints.io import checkpoints_in
    from mmmilan.files import check_output_folder, contains

    check_output_folder(folder)
    has_run = bool(checkpoints_in(folder))
    if has_run and not resume:
        raise InputError(f'{folder} holds a run already; choose another folder, or resume the run (--resume).')
    found = [name for name in files if os.path.lexists(folder / name)]
    has_begun = found == ['config.py'] and contains(folder / 'config.py', WRITTEN)
    if resume and not (has_run or has_begun):
        raise InputError(f'{folder} holds no checkpoint to resume from; leave out resume, or correct the folder.')
    if found and not (has_begun or resume):
        raise InputError(f'{folder} holds {", ".join(found)} already, which would be replaced; choose another folder.')


def set_folder(config: Config, folder: Path) -> None:
    """Let a run write into its folder.

    Raises:
        InputError: its checkpoints, of which its model is made, would not be there.
    """
    checkpoint = config.default_hooks.get('checkpoint')
    if not checkpoint or checkpoint.get('out_dir'):
        key = 'default_hooks.checkpoint' + ('.out_dir' if checkpoint else '')
        raise InputError(f'A run makes its model of the checkpoints in {folder}; leave {key} out.')
    config.work_dir = str(folder.absolute())


def train(config: Config, folder: Path, resume: bool) -> dict[str, Any]:
    """Train as ``tools/train.py`` does; returns how long that took and on what, for the checkpoint.

    The config is written after the first step, so that a run that is refused changes no file.
    """
    import time

    from mmmilan.checkpoints.config import config_text, parse_config
    from mmmilan.engine.config_check import check_batches
    from mmmilan.engine.launch import launched
    from mmmilan.engine.work_dir import ConfigFileHook, make_paths_absolute
    from mmmilan.evaluation.features import choose_device, device_name

    path = folder / 'config.py'
    make_paths_absolute(config._cfg_dict)
    text = config_text(config)
    config = parse_config(text, str(path))  # the values that mmmilan train reads
    config.resume = resume
    config.load_from = None if resume else config.get('load_from')  # resumed is the newest checkpoint
    config.launcher = 'none'
    begin = time.monotonic()
    with launched(config, 'train') as runner:
        check_batches(runner)
        runner.register_hook(ConfigFileHook(path, text))
        runner.train()
    if resume:  # a resumed run knows only the time of its last part
        return {}
    return dict(training_seconds=time.monotonic() - begin, training_device=device_name(choose_device(None)))


def save_weights(checkpoint: Path, path: Path, meta: dict[str, Any]) -> Path:
    """Write the weights of a checkpoint, with its config and more ``meta``, without the state of the optimizer."""
    from mmmilan.checkpoints.io import load_checkpoint_file, save_checkpoint_file

    content = load_checkpoint_file(checkpoint)
    save_checkpoint_file(dict(meta=content['meta'] | meta, state_dict=content['state_dict']), path)
    return path


@contextmanager
def trained_anyway() -> Iterator[None]:
    """Only warn if the page of a training cannot be written, so that the training is not lost."""

    try:
        yield
    except InputError as error:
        warn(f'No report: {error}')
