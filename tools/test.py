"""Evaluate a checkpoint with a config: pretraining, classification, detection, segmentation."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from mmmilan.checkpoints.io import use_safe_loading
from mmmilan.engine import ExactLoadingHook
from mmmilan.engine.distributed import end_processes, init_cpu_processes
from mmmilan.errors import InputError, reported


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint: file, URL or name of a model of the zoo')
    parser.add_argument('--work-dir', help='folder of logs, by default work_dirs/CONFIG')
    parser.add_argument('--out', help='write all predictions to this .pkl file')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE pairs merged into the config, e.g. a.b=3'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    if not os.path.isfile(args.config):
        raise InputError(f'The config {args.config} does not exist.')
    cfg = Config.fromfile(args.config)
    cfg.launcher, cfg.load_from = args.launcher, args.checkpoint
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    use_safe_loading()
    init_cpu_processes(cfg)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(ExactLoadingHook())
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    runner.test()
    end_processes()


if __name__ == '__main__':
    with reported():
        main()
