"""Evaluate a checkpoint with a config: pretraining, classification, detection, segmentation."""

from __future__ import annotations

import argparse

from mmengine.evaluator import DumpResults

from mmmilan.engine.launch import add_shared_arguments, launched, read_config
from mmmilan.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shared_arguments(parser)
    parser.add_argument(
        'checkpoint', nargs='?', help='file, URL or name of a model of the zoo; leave it out after a checkpoint'
    )
    parser.add_argument('--out', help='write all predictions to this .pkl file')
    args = parser.parse_args()
    if args.checkpoint is None and args.config.endswith('.py'):
        raise InputError(f'{args.config} is a config without weights; give a checkpoint after it.')
    return args


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    cfg.load_from = args.checkpoint or args.config
    cfg.resume = False
    with launched(cfg, 'test') as runner:
        if args.out:
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
        runner.test()


if __name__ == '__main__':
    with exit_on_input_error():
        main()
