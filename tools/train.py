"""Train from a config: pretraining, classification, detection, segmentation."""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmmilan.engine.launch import add_shared_arguments, launched, read_config
from mmmilan.engine.optim import computes_in_bfloat16
from mmmilan.errors import InputError, exit_on_input_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shared_arguments(parser)
    parser.add_argument(
        '--resume', nargs='?', const='auto', help='resume from this checkpoint, or from the last one in the work dir'
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision: bfloat16, or float16 if the GPU lacks it')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the real batch size')
    return parser.parse_args()


def enable_amp(cfg: Config) -> None:
    """Turn on mixed precision, unless the config has it already."""
    if cfg.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper':
        bfloat16 = not torch.cuda.is_available() or computes_in_bfloat16('cuda')
        cfg.optim_wrapper.type = 'mmmilan.BFloat16OptimWrapper' if bfloat16 else 'AmpOptimWrapper'


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate by the ratio of the real batch size to that of the config's learning rate.

    MMEngine multiplies the batch size by the number of processes, and this function by the accumulated steps.

    Raises:
        InputError: the config lacks the batch size of its learning rate.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise InputError('The config lacks the batch size of its learning rate; set auto_scale_lr.base_batch_size.')
    cfg.auto_scale_lr.enable = True
    cfg.auto_scale_lr.base_batch_size /= cfg.optim_wrapper.get('accumulative_counts', 1)


def check_not_empty(runner: Runner) -> None:
    """Raise an :class:`InputError` if an epoch has no step, where MMEngine would fail with an unrelated error."""
    loader = runner.train_dataloader
    if len(loader) == 0:
        raise InputError(
            f'The {len(loader.dataset)} training images do not fill one batch of {loader.batch_size} on each of '
            f'{runner.world_size} processes; lower train_dataloader.batch_size.'
        )


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr or (cfg.get('auto_scale_lr') or {}).get('enable'):
        enable_auto_scale_lr(cfg)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    with launched(cfg, 'train') as runner:
        check_not_empty(runner)
        runner.train()


if __name__ == '__main__':
    with exit_on_input_error():
        main()
