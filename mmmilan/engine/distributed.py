"""The processes of a run: their group, how they end, what they send, and models in shards (FSDP2)."""

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
from mmengine.runner import Runner
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from mmmilan.registry import HOOKS


@contextmanager
def processes(cfg: Config) -> Iterator[None]:
    """Join the process group for this context; a launcher's processes exit together at its end.

    The exit status is 0, or that of a stopped run. A process without a launcher continues after the context.
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
    """Configure DistributedDataParallel; on machines without a GPU, torchrun's processes use gloo.

    MMEngine's own set-up requires a GPU per process and keeps a second copy of the gradients.
    """
    if cfg.launcher == 'none':
        return
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
        gradient_as_bucket_view=True,  # gradients are sent without a copy
    )
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        torch.distributed.init_process_group('gloo')
        wrapper['device_ids'] = None
    if 'model_wrapper_cfg' not in cfg:
        cfg.model_wrapper_cfg = wrapper


def end_processes() -> None:
    """Destroy the process group when all processes have arrived: an early exit would close connections in use.

    Garbage is collected first. A DDP wrapper that is the last owner of a process group waits for the group's threads
    while they wait for the GIL, and the process hangs or aborts (PyTorch 2.11).
    """
    if is_distributed():
        barrier()
        gc.collect()
        torch.distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Exit as ``multiprocessing`` does: run the exit handlers, but do not finalize the interpreter.

    A gloo thread may still have to release a tensor, for which it needs the interpreter. During finalization it would
    abort the process ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@HOOKS.register_module()
class GradientCompressionHook(Hook):
    """Send gradients in bfloat16, for machines with a slow network between them.

    DistributedDataParallel then sends half as many bytes and sums gradients with 8 bits of precision.
    """

    def before_train(self, runner: Runner) -> None:
        if isinstance(runner.model, DistributedDataParallel):
            runner.model.register_comm_hook(None, bf16_compress_hook)
