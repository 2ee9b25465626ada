"""Evaluate a checkpoint with a config: pretraining, classification, detection, segmentation."""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
import pickle
from pathlib import Path

from mmengine.evaluator import DumpResults
from mmengine.logging import print_log

from mmmilan.engine.launch import add_shared_arguments, launched, read_config
from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.files import atomic_write, check_output


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shared_arguments(parser)
    parser.add_argument(
        'checkpoint', nargs='?', help='file, URL or name of a model of the zoo; leave it out after a checkpoint'
    )
    parser.add_argument('--out', help='write all predictions to this .pkl file')
    parser.add_argument('--overwrite', action='store_true', help='replace the file of --out if it exists')
    args = parser.parse_args()
    if args.checkpoint is None and args.config.endswith('.py'):
        raise InputError(f'{args.config} is a config without weights; give a checkpoint after it.')
    if args.out is not None:
        inputs = [args.config, args.checkpoint or args.config]
        check_output(args.out, inputs, endings=('.pkl', '.pickle'), overwrite=args.overwrite)
    return args


class SavedPredictions(DumpResults):
    """MMEngine's ``DumpResults``, whose file is written whole or not at all."""

    def compute_metrics(self, results: list) -> dict:
        with atomic_write(Path(self.out_file_path)) as temporary, open(temporary, 'wb') as file:
            pickle.dump(results, file)
        print_log(f'{self.out_file_path}: {len(results)} predictions.', logger='current')
        return {}


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    cfg.load_from = args.checkpoint or args.config
    cfg.resume = False
    with launched(cfg, 'test') as runner:
        if args.out:
            runner.test_evaluator.metrics.append(SavedPredictions(args.out))
        runner.test()


if __name__ == '__main__':
    with exit_on_input_error():
        main()
