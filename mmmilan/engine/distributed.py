"""Several processes without GPUs."""

from __future__ import annotations

import torch
from mmengine.config import Config


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
