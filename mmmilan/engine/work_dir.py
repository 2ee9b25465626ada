"""The folder of a run: locked by one run at a time, which resumes the newest complete checkpoint or starts anew."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmmilan.checkpoints.archives import read_meta
from mmmilan.checkpoints.config import WRITTEN, config_text
from mmmilan.checkpoints.io import checkpoints_in, find_newest
from mmmilan.components import type_name
from mmmilan.engine.loops import use_epoch_loop
from mmmilan.engine.program import only_training
from mmmilan.engine.resuming import changed_settings
from mmmilan.errors import InputError, count, warn
from mmmilan.files import check_output, contains, is_same, make_folder, write_text

FILES, FOLDERS = ('pretrained', 'checkpoint', 'load_from'), ('data_root', 'cache', 'db_path')  # keys in a config
TIMESTAMPS: set[str] = set()  # of the runs of this process
mmengine_setup_env = Runner.setup_env


@contextmanager
def locked(work_dir: Path) -> Iterator[None]:
    """Lock a work dir for this run. The lock is released when the process ends for any reason.

    Raises:
        InputError: another run holds the lock.
    """
    make_folder(work_dir)
    with open(check_output(work_dir / '.lock', overwrite=True), 'a+') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # data workers would inherit a flock
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without locks
                warn(f'{work_dir} cannot be locked ({error.strerror}).')
            else:
                file.seek(0)
                holder = file.read()  # empty until the other run has written who it is
                other = f'another run ({holder})' if holder else 'another run'
                raise InputError(
                    f'{work_dir} is in use by {other}; end that one, or choose another --work-dir.'
                ) from None
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield


@contextmanager
def training_in(cfg: Config) -> Iterator[None]:
    """Lock and prepare the work dir of a training run; find the checkpoint to resume from."""
    main = is_main(cfg)
    use_epoch_loop(cfg)
    make_paths_absolute(cfg._cfg_dict)
    with only_training(), locked(Path(cfg.work_dir)) if main else nullcontext():
        prepare(cfg, main)
        yield


def make_paths_absolute(part: dict | list) -> None:
    """Make paths in a config absolute, in place, so that what the run writes can be used from any folder.

    A value may be a name and no path: only what exists is one, and the cache that a run makes itself.
    """
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if isinstance(value, (dict, list)):
            make_paths_absolute(value)
        elif isinstance(value, str) and (
            (key in FILES and os.path.isfile(value))
            or (key in FOLDERS and os.path.isdir(value))
            or (key == 'ann_file' and 'data_root' not in part and os.path.isfile(value))
            or (key == 'cache' and value and type_name(part) == 'TeacherCacheHook')
        ):
            part[key] = os.path.abspath(value)


def is_main(cfg: Config) -> bool:
    """Whether this is the main process, by the launcher's environment variables."""
    rank = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}.get(cfg.launcher)
    return rank is None or os.environ.get(rank, '0') == '0'


def checkpoint_folder(cfg: Config) -> Path:
    """Where the checkpoint hook writes."""
    out_dir = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('out_dir')
    return Path(out_dir, Path(cfg.work_dir).name) if out_dir else Path(cfg.work_dir)


def can_resume(cfg: Config) -> bool:
    """Whether the run's folder has a checkpoint; without one a run that is to be resumed begins anew, and says so."""
    folder = checkpoint_folder(cfg)
    if not (found := checkpoints_in(folder)):
        start = f', from {cfg.load_from}' if cfg.get('load_from') else ''
        warn(f'{folder} holds no checkpoint to resume from: the run begins anew with its config{start}.')
    return bool(found)


def setup_env(runner: Runner, env_cfg: dict) -> None:
    """MMEngine's ``Runner.setup_env``, with a timestamp that no other run has, in this process or in the work dir.

    By it MMEngine names the folder of the log and the scores, and what it keeps in a process, such as loggers: of two
    tests that start in one second, one would write over the log and the scores of the other.
    """
    mmengine_setup_env(runner, env_cfg)
    chosen = [reserve_timestamp(Path(runner.work_dir), runner.timestamp) if runner.rank == 0 else '']
    broadcast_object_list(chosen)
    runner._timestamp = chosen[0]


def reserve_timestamp(work_dir: Path, second: str) -> str:
    """The timestamp of a run that starts in a second: it, or it with a number; the folder of its log is made."""
    make_folder(work_dir)
    for number in itertools.count(1):
        name = f'{second}_{number}' if number > 1 else second
        with suppress(FileExistsError):
            if name not in TIMESTAMPS:
                (work_dir / name).mkdir()
                TIMESTAMPS.add(name)
                return name


@master_only
def write_config(runner: Runner) -> None:
    """Write the config of a runner into its work dir, or beside its log if it would replace another file there.

    MMEngine's ``Runner.dump_config`` replaces any file of the config's name, be it the one that was read.
    """
    cfg, work_dir = runner.cfg, Path(runner.work_dir)
    path = work_dir / Path(cfg.filename or '').name
    if not cfg.filename or is_same(path, cfg.filename) or (path.exists() and not contains(path, WRITTEN)):
        path = Path(runner.log_dir, path.name if cfg.filename else 'config.py')
    write_text(path, config_text(cfg))


def prepare(cfg: Config, main: bool) -> None:
    """Find the checkpoint to resume from, or move away the checkpoints of an earlier run.

    Args:
        cfg: With ``resume``, its ``load_from`` is set.
        main: Whether this is the main process, which moves the files.
    """
    folder = checkpoint_folder(cfg)
    if cfg.get('resume') and (cfg.get('load_from') or can_resume(cfg)):
        cfg.load_from = cfg.get('load_from') or str(find_newest(folder))
        if Path(cfg.load_from).is_file():
            refuse_other_config(Path(cfg.load_from), cfg)
        return
    cfg.resume = False
    earlier = [*checkpoints_in(folder), *folder.glob('best_*.pth'), *folder.glob('last_checkpoint')]
    if cfg.get('load_from') and Path(cfg.load_from).absolute() in [path.absolute() for path in earlier]:
        raise InputError(
            f'{cfg.load_from} belongs to an earlier run in the same work dir, whose checkpoints the new run would '
            'overwrite; choose another --work-dir, or continue that run with --resume.'
        )
    if main and earlier:
        set_aside(earlier, folder)


def refuse_other_config(checkpoint: Path, cfg: Config) -> None:
    """Raise an :class:`InputError` if a config cannot resume a checkpoint, before the run writes anything."""
    try:
        meta = read_meta(checkpoint)
    except Exception:  # of any type; a damaged file is named when it is loaded
        return
    if isinstance(meta, dict):
        changed_settings(meta, cfg, str(checkpoint))


class ConfigFileHook(Hook):
    """Write the config of a run after its first step: a run that is refused, as at ``resume``, changes no file.

    Args:
        path: The file.
        text: Its content.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.written = path, text, False

    @master_only
    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if not self.written:
            write_text(self.path, self.text)
            self.written = True


def set_aside(paths: list[Path], folder: Path) -> None:
    """Move the checkpoints of an earlier run into a folder of their own, where the new run does not overwrite them."""
    number = 1
    while (target := folder / f'earlier_{number}').exists():
        number += 1
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    warn(
        f'{folder} holds an earlier run: {count(len(paths), "checkpoint")} moved to {target} (--resume continues a '
        'run).'
    )
