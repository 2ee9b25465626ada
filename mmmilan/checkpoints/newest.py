"""Find the newest complete checkpoint of a run by reading the files."""

from __future__ import annotations

import logging
from pathlib import Path

from mmengine.logging import print_log

from mmmilan.checkpoints.config import parse_config
from mmmilan.checkpoints.unpickling import check_archive, read_meta
from mmmilan.errors import InputError
from mmmilan.files import first_line

STOPPED = 'stopped_iter_'  # prefix of the checkpoint of a run that was told to stop


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder that a run can resume, by MMEngine's file names and ``STOPPED``."""
    return sorted(path for kind in ('epoch', 'iter', STOPPED[:-1]) for path in folder.glob(f'{kind}_[0-9]*.pth'))


def find_newest(folder: Path) -> Path | None:
    """The complete checkpoint of the latest iteration; None if the folder has no checkpoints.

    The files decide, not ``last_checkpoint``, so the folder can be copied or moved. Damaged files are skipped with a
    warning.

    Raises:
        InputError: there are checkpoints, but none is complete.
    """
    found: list[tuple[int, Path]] = []
    paths = checkpoints_in(folder)
    for path in paths:
        try:
            found.append((int(read_meta(path)['iter']), path))
        except Exception as error:  # of any type, as the file may hold anything
            _say_skipped(path, error)
    for _, path in sorted(found, reverse=True):
        try:
            check_archive(path)
            return path
        except Exception as error:
            _say_skipped(path, error)
    if paths:
        raise InputError(
            f'None of the {len(paths)} checkpoints in {folder} is complete; copy one there, or start anew in another '
            '--work-dir.'
        )
    return None


def unfinished(path: Path) -> str | None:
    """How far the run of a checkpoint is, such as 'epoch 3 of 400'; None if it is finished, or does not say its end."""
    meta = read_meta(path)
    if not isinstance(meta.get('cfg'), str):
        return None
    loop = parse_config(meta['cfg'], f'the config in {path}').get('train_cfg') or {}
    unit, end = ('epoch', loop['max_epochs']) if 'max_epochs' in loop else ('iteration', loop.get('max_iters'))
    done = meta.get('epoch' if unit == 'epoch' else 'iter')
    return f'{unit} {done} of {end}' if isinstance(done, int) and isinstance(end, int) and done < end else None


def _say_skipped(path: Path, error: Exception) -> None:
    print_log(f'{path} is skipped: {first_line(error)}.', logger='current', level=logging.WARNING)
