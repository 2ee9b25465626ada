"""Several processes: without GPUs, with one model in pieces, or with one optimizer in pieces."""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_distributed
from mmengine.optim import ZeroRedundancyOptimizer as MMEngineZeroRedundancyOptimizer
from mmengine.runner import Runner

from mmmilan.engine.checkpointing import CheckpointHook
from mmmilan.registry import HOOKS, OPTIMIZERS


def init_cpu_processes(cfg: Config) -> None:
    """Let the processes of torchrun work together on CPU, by gloo, where there is no GPU.

    MMEngine itself takes for granted that each process has a GPU.
    """
    if cfg.launcher != 'pytorch' or torch.cuda.is_available():
        return
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )


def end_processes() -> None:
    """Let all processes leave together: one that is gone early takes connections with it that others may still use."""
    if is_distributed():
        barrier()
        torch.distributed.destroy_process_group()


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
