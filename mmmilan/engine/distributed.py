"""Several processes: without GPUs, or with one model in pieces."""

from __future__ import annotations

import torch
from mmengine.config import Config
from torch import nn


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


def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """FSDP's ``auto_wrap_policy``: every transformer block is gathered and released on its own, all else at once."""
    from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

    from mmmilan.models.decoders import PromptingBlock

    return recurse or isinstance(module, TransformerEncoderLayer | PromptingBlock)
