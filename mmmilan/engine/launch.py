"""What ``tools/train.py`` and ``tools/test.py`` share: arguments, the config, processes."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmmilan.checkpoints.config import check_plain, own_config
from mmmilan.checkpoints.foreign_config import within_weights
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.engine.class_names import ClassCountHook
from mmmilan.engine.config_check import check_data, check_data_sets, unread_options, use_boxes_alone
from mmmilan.engine.data_workers import guard_workers, worker_errors
from mmmilan.engine.distributed import processes
from mmmilan.engine.heartbeat import HeartbeatHook
from mmmilan.engine.hooks import ExactLoadingHook, ImageSizeHook
from mmmilan.engine.stopping import StopHook
from mmmilan.engine.work_dir import is_main, training_in, write_config
from mmmilan.errors import InputError
from mmmilan.files import check_output_folder


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and the options that both tools have."""
    parser.add_argument('config', help='config file, or a checkpoint that holds its config')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints, by default work_dirs/CONFIG[/PRETRAIN]')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE pairs merged into the config, e.g. a.b=3'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)


def read_config(args: argparse.Namespace) -> Config:
    """The config with the command line's options merged in.

    Raises:
        InputError: there is no such file, or an option has a name or a value that no config can have.
    """
    if not os.path.isfile(args.config):
        raise InputError(f'The config {args.config} does not exist; correct its path.')
    cfg = Config.fromfile(args.config) if args.config.endswith('.py') else own_config(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options:
        for sentence in unread_options(cfg, args.cfg_options):
            print_log(sentence, logger='current', level=logging.WARNING)
        cfg.merge_from_dict(args.cfg_options)
    check_plain(cfg.to_dict())
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or default_work_dir(cfg, args.config)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg


def default_work_dir(cfg: Config, path: str) -> str:
    """``work_dirs/CONFIG``, or ``work_dirs/CONFIG/NAME`` if the environment sets ``PRETRAIN=NAME``."""
    pretrain = cfg.env_variables.get('PRETRAIN', '')  # '' unless it is set and the config reads it
    return str(Path('work_dirs', Path(path).stem, pretrain.replace('/', '_')))


@contextmanager
def launched(cfg: Config, task: str) -> Iterator[Runner]:
    """Build the runner of a config, which loads checkpoints safely and exactly.

    A training run locks its work dir, and can be stopped and resumed without loss. A launcher's processes exit at the
    end of this context.

    Args:
        cfg: The config.
        task: 'train' or 'test'; the data of this task must exist.

    Raises:
        InputError: data are missing; mmcv lacks the operators that mmdet and mmseg import; another run uses the work
            dir; there is no complete checkpoint to resume from; a data worker died or hangs.
    """
    if cfg.get('default_scope') in ('mmdet', 'mmseg') and find_spec('mmcv._ext') is None:
        raise InputError(
            'Detection and segmentation need mmcv with its operators, but this mmcv was built without them; install it '
            'as docs/installation.md says (dense).'
        )
    check_data(cfg, task)
    changed = use_boxes_alone(cfg, task)
    if is_main(cfg):
        check_output_folder(cfg.work_dir)
    use_safe_loading()
    Runner.dump_config = write_config
    with training_in(cfg) if task == 'train' else nullcontext(), processes(cfg):
        with within_weights(cfg):
            runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        if changed:
            runner.logger.warning(changed)
        runner.register_hook(ExactLoadingHook())
        runner.register_hook(ImageSizeHook())
        runner.register_hook(ClassCountHook())
        guard_workers(runner)
        check_data_sets(runner)
        heartbeat = HeartbeatHook()
        if task == 'train':
            runner.register_hook(StopHook())
            runner.register_hook(heartbeat)
        with heartbeat.publish_error(), worker_errors():
            yield runner
