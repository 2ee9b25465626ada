"""CPU process groups, FSDP wrapping, ZeRO checkpoints."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_distributed
from mmengine.hooks import Hook
from mmengine.optim import ZeroRedundancyOptimizer as MMEngineZeroRedundancyOptimizer
from mmengine.runner import Runner
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from mmmilan.engine.checkpointing import CheckpointHook
from mmmilan.registry import HOOKS, OPTIMIZERS


@contextmanager
def processes(cfg: Config) -> Iterator[None]:
    """What a launcher's process does; at the end of this context all leave together, with the status of a stopped run.

    A process without a launcher goes on.
    """
    init_processes(cfg)
    status = 0
    try:
        yield
    except SystemExit as stop:  # of StopHook, in all processes after the same step
        if cfg.launcher == 'none':
            raise
        status = stop.code
    if cfg.launcher != 'none':
        end_processes()
        leave(status)


def init_processes(cfg: Config) -> None:
    """Let processes share their gradients; where there is no GPU, those of torchrun by gloo.

    MMEngine itself takes for granted that each process has a GPU, and keeps gradients twice.
    """
    if cfg.launcher == 'none':
        return
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
        gradient_as_bucket_view=True,  # what is sent is the gradient itself and not a copy
    )
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        torch.distributed.init_process_group('gloo')
        wrapper['device_ids'] = None
    if 'model_wrapper_cfg' not in cfg:
        cfg.model_wrapper_cfg = wrapper


def end_processes() -> None:
    """Let all processes leave together: one that is gone early takes connections with it that others may still use.

    What nothing refers to any more goes first. A DDP wrapper that is the last owner of a process group waits for the
    group's threads while they wait for Python's lock, and the process hangs or aborts (PyTorch 2.11).
    """
    if is_distributed():
        barrier()
        gc.collect()
        torch.distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process as ``multiprocessing`` ends its own: what is registered for the exit is done, and no more.

    A thread of gloo may be about to let go of a tensor, for which it needs the interpreter. If that were taken apart
    meanwhile, the thread would take the process down ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@OPTIMIZERS.register_module()
class ZeroRedundancyOptimizer(MMEngineZeroRedundancyOptimizer):
    """MMEngine's ZeRO, stage 1, for checkpoints of :class:`ZeroCheckpointHook`. Same arguments.

    MMEngine's collects the states of all processes whenever it is asked for them, but only one process asks.
    """

    def state_dict(self) -> dict:
        """What ``consolidate_state_dict`` collected."""
        return super(MMEngineZeroRedundancyOptimizer, self).state_dict()


@HOOKS.register_module()
class ZeroCheckpointHook(CheckpointHook):
    """Our hook, for :class:`ZeroRedundancyOptimizer`: all processes hand in their states before one saves."""

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        runner.optim_wrapper.optimizer.consolidate_state_dict()
        super()._save_checkpoint_with_step(runner, step, meta)


@HOOKS.register_module()
class GradientCompressionHook(Hook):
    """Send gradients in bfloat16, for processes between which there is one slow network card.

    DistributedDataParallel then sends half as much, and adds up gradients of 8 bits of precision.
    """

    def before_train(self, runner: Runner) -> None:
        if isinstance(runner.model, DistributedDataParallel):
            runner.model.register_comm_hook(None, bf16_compress_hook)
